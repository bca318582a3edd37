"""What every source of rows offers, and the parts that the rows of a split come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import read_file
from .json_documents import is_one_object
from .row import Row


@dataclass(frozen=True)
class FilePart:
    """A file of a split.

    `may_be_metadata`: it is a .json file beside other data, and may describe them.
    """

    name: str
    path: Path
    may_be_metadata: bool = False

    def rows(self) -> Iterator[Row]:
        """See `Source.rows`."""
        return read_file(self.path)

    def is_one_object(self) -> bool:
        """Whether the file holds one JSON object and nothing else."""
        return is_one_object(self.path)


@dataclass(frozen=True)
class WholePart:
    """A split that is read as a whole."""

    name: str
    source: Source
    split: str
    may_be_metadata: bool = False

    def rows(self) -> Iterator[Row]:
        """See `Source.rows`."""
        return self.source.rows(self.split)

    def is_one_object(self) -> bool:
        """False: it is no file."""
        return False


Part = FilePart | WholePart


@dataclass
class Source:
    """One dataset of `--dataset`: its name as given, its fraction of the training set (None: all it has)."""

    name: str
    weight: float | None = None

    def splits(self) -> tuple[str, ...]:
        """The names of its splits, "train" first where there is one."""
        raise NotImplementedError

    def rows(self, split: str) -> Iterator[Row]:
        """Every row of a split with its place; a row that cannot be read is a BadSample."""
        raise NotImplementedError

    def parts(self, split: str) -> list[Part]:
        """What the rows of a split come from, in their order."""
        return [WholePart(self.name, self, split)]

    def identity(self, split: str) -> str:
        """A string that changes whenever the rows of that split may."""
        raise NotImplementedError

    def report(self) -> list[str]:
        """Lines about what was found and what is passed over."""
        return []
