"""Patterns over layer names: a name, a dotted end of one, a glob, or `re:` and a regular expression."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from ..errors import UserError

EXPRESSION = "re:"  # llm-compressor's spelling
HELP = "a name such as lm_head, a glob such as '*.down_proj', or 're:.*down_proj'"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a full name: itself, as a glob, or any dotted end of it.

    An expression behind `re:` must match from the beginning of the name, as in llm-compressor.

    Raises:
        UserError: the expression is not a regular expression.
    """
    if not pattern.startswith(EXPRESSION):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    try:
        return re.match(pattern.removeprefix(EXPRESSION), name) is not None
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not a regular expression ({error}); give {HELP}") from error
