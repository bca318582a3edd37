"""What an answer says: the number that it ends with, or the code that it shows."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+"
_MARKED = re.compile(rf"(?:\\boxed\{{|####)[^\d{{}}.-]*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_BLOCK = re.compile(
    r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def final_number(answer: str) -> Decimal | None:
    r"""The last number that the answer marks with \boxed{} or ####; where it marks none, its last number, or None."""
    found = _MARKED.findall(answer) or _ANY.findall(answer)
    return as_number(found[-1]) if found else None


def as_number(text: str) -> Decimal:
    """A number as people write it: 1,234 and $5 too."""
    return Decimal(text.replace(",", "").replace("$", ""))


def code_of(answer: str, function: str) -> str:
    """The Markdown block that defines `function`, else the first block, else the whole answer.

    A block that the answer does not close ends with the answer.
    """
    blocks = _BLOCK.findall(answer)
    defining = [
        block for block in blocks if re.search(rf"^\s*(async )?def {re.escape(function)}\b", block, re.MULTILINE)
    ]
    return (defining or blocks or [answer])[0]
