"""What is expected of an entry, where that is not a proven packed folder."""

from __future__ import annotations

from .entries import Expected

EXPECTED: dict[str, Expected] = {}
