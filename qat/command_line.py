"""OneLineParser: an argparse parser that ends the program with one line, `error: ...`, and status 2.

argparse prints a usage of hundreds of lines first, guesses abbreviations, and does not suggest what a wrong name may
have meant.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, NoReturn

from .errors import STATUS, report

_KINDS = {  # what the types of arguments are called
    "int": "a whole number",
    "float": "a number",
    "positive": "a whole number of at least 1",
    "not_negative": "a whole number of at least 0",
    "positive_number": "a number above 0",
    "not_negative_number": "a number of at least 0",
    "strength": "a number from 0 to 1, or auto",
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose every error is one line that names the argument and its value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "exit_on_error": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        report(message)
        sys.exit(STATUS)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """argparse's own; a wrong value ends the program with one line."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            self.error(self._in_words(error))

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """argparse's own; an unknown argument ends the program with one line that suggests the nearest."""
        namespace, rest = self.parse_known_args(args, namespace)
        self.refuse_unknown(rest)
        return namespace

    def refuse_unknown(self, rest: Sequence[str]) -> None:
        """End the program if `rest`, the words that no argument took, is not empty."""
        flag = next((word for word in rest if word.startswith("--")), None)
        if flag is not None:
            name = flag.partition("=")[0]
            self.error(f"{name} is not an argument of {self.prog}{suggestion(name, self._option_string_actions)}")
        if rest:
            self.error(f"{rest[0]!r} belongs to no argument of {self.prog}; an argument is given as --name value")

    def _in_words(self, error: argparse.ArgumentError) -> str:
        """argparse's message in the words of this program: the name, the value, what it should be."""
        name, message = (error.argument_name or "").split("/")[0], error.message
        if wrong := re.fullmatch(r"invalid (\w+) value: (.*)", message):
            kind = getattr(self._option_string_actions.get(name), "type", None)
            if isinstance(kind, type) and issubclass(kind, Enum):
                return f"{name} {wrong[2]} is unknown; choose one of {', '.join(str(member.value) for member in kind)}"
            return f"{name} {wrong[2]} is not {_KINDS.get(wrong[1], wrong[1])}"
        if wrong := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", message):
            return f"{name} {wrong[1]} is unknown; choose one of {wrong[2].replace(chr(39), '')}"
        if wrong := re.match(r"Truthy value expected: got (.*) but expected", message):
            return f"{name} {wrong[1]!r} is neither True nor False"
        if message.startswith("expected"):
            return f"{name} has no value; give it {message.removeprefix('expected ').replace('argument', 'value')}"
        return f"{name}: {message}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'max_steps'?" for the nearest of the known names, "" where none is near."""
    nearest = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def positive(text: str) -> int:
    """A whole number of at least 1: a type for `add_argument`."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def not_negative(text: str) -> int:
    """A whole number of at least 0: a type for `add_argument`."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


def positive_number(text: str) -> float:
    """A finite number above 0: a type for `add_argument`."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


def not_negative_number(text: str) -> float:
    """A finite number of at least 0: a type for `add_argument`."""
    if not 0 <= (number := float(text)) < math.inf:
        raise ValueError
    return number
