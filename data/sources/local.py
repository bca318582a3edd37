"""Local files, patterns and folders as a source."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qat.errors import UserError

from .compressed import kind_of
from .files import READERS
from .folders import Folder, read_folder, shown
from .row import Row
from .source import FilePart, Part, Source
from .splits import is_for_training, words_of

FILE_KINDS = tuple(READERS)


@dataclass
class LocalFiles(Source):
    """A file, which is the split "train" whatever its name; or a folder or pattern: see `data.sources.folders`."""

    requested: tuple[str, ...] = ()
    argument: str = "dataset"
    configuration: str | None = None

    def __post_init__(self) -> None:
        path = Path(self.name.removesuffix(f"@{self.configuration}")).expanduser()
        if path.is_file():
            self._root, self._folder = path.parent, Folder({"train": [path]})
            if kind_of(path) not in READERS:
                self._folder = Folder(passed_over={"of no known kind": [path.name]})
        elif path.is_dir():
            self._root = path
            self._folder = read_folder(path, self.requested, self.argument, None, self.configuration)
        elif path.exists():
            raise UserError(f"--{self.argument} {self.name}: neither a regular file nor a folder")
        else:
            self._root, files = _matches(str(path))
            self._folder = read_folder(self._root, self.requested, self.argument, files)
        if not self._folder.splits:
            found = self._folder.report() or "nothing"
            raise UserError(f"--{self.argument} {self.name}: found {found}; give files among {', '.join(FILE_KINDS)}")

    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(self._folder.splits, key=lambda name: name != "train"))

    def rows(self, split: str) -> Iterator[Row]:
        for part in self.parts(split):
            yield from part.rows()

    def parts(self, split: str) -> list[Part]:
        several = sum(map(len, self._folder.splits.values())) > 1
        return [FilePart(str(file), file, several and kind_of(file) == ".json") for file in self._folder.splits[split]]

    def identity(self, split: str) -> str:
        try:
            parts = [(self._relative(part.path), part) for part in self.parts(split)]
            return " ".join(f"{name}={_hash_of(part.path)}{part.may_be_metadata:d}" for name, part in parts)
        except OSError as error:
            place, reason = error.filename or self.name, error.strerror or error
            raise UserError(f"--{self.argument} {self.name}: {place} cannot be read: {reason}") from error

    def files(self, split: str) -> list[Path]:
        """The files of a split, in the order in which they are read."""
        return self._folder.splits[split]

    def report(self) -> list[str]:
        """The files per split, and those that are passed over."""
        names = {split: [self._relative(file) for file in files] for split, files in self._folder.splits.items()}
        lines = []
        if Path(self.name).expanduser().is_file():
            if any(not is_for_training(word) for word in words_of(Path(self.name).name)):
                lines.append(f"{self.name}: a file that is given by name is taken as it is, whatever its name says")
        else:
            found = "; ".join(f"{split}: {shown(names[split])}" for split in self.splits())
            lines.append(f"{self.name}: files per split: {found}")
        if passed_over := self._folder.report():
            lines.append(f"{self.name}: passed over {passed_over}")
        return lines

    def _relative(self, file: Path) -> str:
        return str(file.relative_to(self._root))


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The folder above the first wildcard of a pattern, and the files that match, hidden ones left out."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = Path(*parts[:fixed])
    return root, sorted(Path(file) for file in glob.glob(pattern, recursive=True) if Path(file).is_file())


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
