"""Patterns over layer names: a name, a dotted end of one, a glob, or `re:` and a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import cache

from ..errors import UserError

EXPRESSION = "re:"  # llm-compressor's spelling
HELP = "a name such as lm_head, a glob such as '*.down_proj', or 're:.*down_proj'"
_MAX_WILDCARDS = 1000  # each is compared with every layer; names without wildcards cost nothing


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a full name: itself, as a glob, or any dotted end of it.

    An expression behind `re:` must match from the beginning of the name, as in llm-compressor.

    Raises:
        UserError: the expression is not a regular expression.
    """
    if not _has_wildcards(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    return _compiled(pattern)(name) is not None


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise a UserError for more globs and expressions than can be compared with all layers in reasonable time."""
    count = sum(map(_has_wildcards, patterns))
    if count > _MAX_WILDCARDS:
        raise UserError(f"{count} globs are more than {_MAX_WILDCARDS}; write out the names, or fewer globs")


def _has_wildcards(pattern: str) -> bool:
    return pattern.startswith(EXPRESSION) or any(character in pattern for character in "*?[")


@cache
def _compiled(pattern: str) -> Callable[[str], re.Match | None]:
    if not pattern.startswith(EXPRESSION):
        return re.compile(rf"(?s:.*\.)?(?:{translate(pattern)})").match
    try:
        return re.compile(pattern.removeprefix(EXPRESSION)).match
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not a regular expression ({error}); give {HELP}") from error
