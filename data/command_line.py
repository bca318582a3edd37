"""DataclassParser: dataclasses from the command line; every mistake ends the program with one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from qat.command_line import OneLineParser


class DataclassParser(OneLineParser, HfArgumentParser):
    """transformers' HfArgumentParser with the errors of OneLineParser.

    Args:
        dataclass_types: whose fields are the arguments; each checks itself when it is made.
    """

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass, and a namespace where arguments were added; default: the program's own words.

        A wrong value, an unknown argument or a UserError of a dataclass ends the program with one line.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        self.refuse_unknown(
            self.parse_known_args(words)[1]
        )  # before a dataclass complains of what was not meant for it
        try:
            return self.parse_args_into_dataclasses(words, look_for_args_file=False)
        except ValueError as error:
            self.error(str(error))
