"""What an answer says: the number that it ends with, or the code that it shows."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+"
_ANY = re.compile(_NUMBER)
_BOX = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_MARKED = re.compile(rf"{_BOX}|####[ \t]*({_NUMBER})[ \t.%*]*$", re.MULTILINE)
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ])(?=\d)")  # 1{,}234 and 1\,234, as LaTeX groups digits
_FRACTION = re.compile(r"\\[dt]?frac\{\s*(\d+)\s*\}\{\s*0*([1-9]\d*)\s*\}")
_BLOCK = re.compile(r"```[ \t]*([^\s`]*)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def final_number(answer: str) -> Decimal | None:
    r"""The last number that the answer marks with \boxed{} or a line of ####, else its last number, or None.

    Of a box with an equation it is the number behind the last equals sign; a fraction is its quotient.
    """
    found = [line or _in_box(box) for box, line in _MARKED.findall(answer)]
    found = [number for number in found if number] or _ANY.findall(answer)
    return as_number(found[-1]) if found else None


def _in_box(box: str) -> str:
    """The number that a box says, or an empty text."""
    said = _FRACTION.sub(lambda parts: f"{Decimal(parts[1]) / Decimal(parts[2]):f}", _GROUPED.sub("", box))
    found = _ANY.search(said.rpartition("=")[2])
    return found.group() if found else ""


def as_number(text: str) -> Decimal:
    """A number as people write it: 1,234 and $5 too."""
    return Decimal(text.replace(",", "").replace("$", ""))


def code_of(answer: str, function: str) -> str:
    """The Markdown block of Python that defines `function`, else the first such block, else the whole answer.

    A block without a language may be Python. One that the answer does not close ends with the answer.
    """
    named = [(language.lower(), block) for language, block in _BLOCK.findall(answer)]
    blocks = [block for language, block in named if not language or language.startswith("py")]
    defining = [
        block for block in blocks if re.search(rf"^\s*(async )?def {re.escape(function)}\b", block, re.MULTILINE)
    ]
    return (defining or blocks or [answer])[0]
