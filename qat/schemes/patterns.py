"""Patterns over names of layers: globs that match a full name or any dotted end of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import cache

from ..errors import UserError

_MAX_GLOBS = 1000  # each is compared with every layer; names without wildcards cost nothing


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches a layer called `name`: "lm_head" and "*head" both match "model.lm_head"."""
    if not _is_glob(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    return _compiled(pattern)(name) is not None


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise a UserError for more globs than can be compared with all layers in reasonable time."""
    count = sum(map(_is_glob, patterns))
    if count > _MAX_GLOBS:
        raise UserError(f"{count} globs are more than {_MAX_GLOBS}; write out the names, or fewer globs")


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


@cache
def _compiled(pattern: str) -> Callable[[str], re.Match | None]:
    return re.compile(rf"(?s:.*\.)?(?:{translate(pattern)})").match
