"""Where rows come from: named datasets, any id on the hub, local files and folders, several of them with weights.

`--dataset a.jsonl:0.7,Daring-Anteater:0.3` names two sources; `parse_sources` finds out what each is, and a `Source`
gives the rows of its splits and an identity by which a cache may know them.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from qat.errors import UserError

from ..bad_samples import BadSample
from .compressed import kind_of
from .files import READERS, read_file
from .folders import Folder, read_folder, shown
from .json_documents import is_one_object
from .python_docs import read_python_docs
from .row import Row
from .splits import is_for_training, words_of

# name -> hub id, configuration
_HUB = {
    "Daring-Anteater": ("nvidia/Daring-Anteater", None),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
}
DEFAULT_EVAL_SIZE = {"Daring-Anteater": 2000, "cnn_dailymail": 2000, "python-docs": 256}
DATASET_NAMES = ("Daring-Anteater", "cnn_dailymail", "python-docs")
FILE_KINDS = tuple(READERS)
HELP = (
    f"{', '.join(DATASET_NAMES)}, a hub id (`user/name`, `user/name@configuration`), or a local "
    f"{', '.join(FILE_KINDS)} file, a pattern (`data/*.jsonl`), a folder of such files or one of `save_to_disk`; "
    "several with commas and weights: `a.jsonl:0.7,Daring-Anteater:0.3`"
)


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


@dataclass
class PythonDocs(Source):
    """The embedded set: see `data.sources.python_docs`."""

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        for number, row in enumerate(read_python_docs()):
            yield f"python-docs[{number}]", row

    def identity(self, split: str) -> str:
        return f"python-docs of {sys.version}"


@dataclass
class LocalFiles(Source):
    """A file, which is the split "train" whatever its name; or a folder or pattern: see `data.sources.folders`."""

    requested: tuple[str, ...] = ()
    argument: str = "dataset"

    def __post_init__(self) -> None:
        path = Path(self.name).expanduser()
        if path.is_file():
            self._root, self._folder = path.parent, Folder({"train": [path]})
            if kind_of(path) not in READERS:
                self._folder = Folder(passed_over={"of no known kind": [path.name]})
        elif path.is_dir():
            self._root, self._folder = path, read_folder(path, self.requested, self.argument)
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


@dataclass
class HubDataset(Source):
    """A dataset on the hub, loaded by `datasets`; streamed from it with `streaming`."""

    hub_id: str = ""
    configuration: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        try:
            self._splits = datasets.load_dataset(self.hub_id, self.configuration, streaming=self.streaming)
        except Exception as error:  # dozens of kinds: network, access, missing configuration, broken files
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--dataset {self.name!r} cannot be loaded from the hub as {self.hub_id!r} ({detail[:300]}). "
                f"Known are {HELP}; python-docs needs no network"
            ) from error

    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(self._splits, key=lambda name: name != "train"))

    def rows(self, split: str) -> Iterator[Row]:
        rows, number = iter(self._splits[split]), 0
        while True:
            place = f"{self.name}/{split}[{number}]"
            try:
                row = next(rows, None)
            except Exception as error:  # whatever a remote file's reader raises; the stream has ended with it
                yield place, BadSample("unreadable row", f"{type(error).__name__}: {str(error)[:200]}", place)
                return
            if row is None:
                return
            yield place, row
            number += 1

    def identity(self, split: str) -> str:
        return f"{self.hub_id} {self.configuration} {getattr(self._splits[split], '_fingerprint', None)}"


def parse_sources(
    spec: str, argument: str = "dataset", requested: tuple[str, ...] = (), streaming: bool = False
) -> list[Source]:
    """The sources that `spec` names.

    Args:
        spec: see `HELP`.
        argument: the command-line argument that `spec` is the value of, for messages.
        requested: names of splits that files of a folder may have, besides the words that `datasets` knows.
        streaming: read hub datasets as streams.

    Raises:
        UserError: no such dataset, a weight that is not a positive number, weights on some sources only.
    """
    sources = []
    for part in _parts(spec):
        name, weight = _split_weight(part, argument)
        sources.append(_open(name, weight, argument, requested, streaming))
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"--{argument} {spec!r} gives weights to some datasets only; give one to each, or to none")
    return sources


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def _parts(spec: str) -> list[str]:
    """The datasets between commas; a comma in the path of an existing file or folder divides nothing."""
    if _is_path(spec):
        return [spec]
    pieces, parts = [piece.strip() for piece in spec.split(",")], []
    while pieces:
        count = next((n for n in range(len(pieces), 1, -1) if _is_path(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return parts


def _is_path(part: str) -> bool:
    name, _, weight = part.rpartition(":")
    return _exists(part) or ("," not in weight and _exists(name))


def _split_weight(part: str, argument: str) -> tuple[str, float | None]:
    name, colon, number = part.rpartition(":")
    if _exists(part) or not colon:
        return part, None
    try:
        weight = float(number)
    except ValueError:
        return part, None
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"--{argument} {part!r}: the weight {number} is not a positive number")
    return name, weight


def _open(name: str, weight: float | None, argument: str, requested: tuple[str, ...], streaming: bool) -> Source:
    if name == "python-docs":
        return PythonDocs(name, weight)
    if name and (_exists(name) or glob.has_magic(name)):
        return LocalFiles(name, weight, requested, argument)
    if name in _HUB:
        return HubDataset(name, weight, *_HUB[name], streaming)
    looks_local = kind_of(Path(name)) in READERS or name.startswith((".", "/", "~"))
    if looks_local or name.count("/") != 1:
        raise UserError(f"--{argument} {name!r} is neither a known dataset nor an existing path; known are {HELP}")
    hub_id, _, configuration = name.partition("@")
    return HubDataset(name, weight, hub_id, configuration or None, streaming)


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The folder above the first wildcard of a pattern, and the files that match, hidden ones left out."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = Path(*parts[:fixed])
    return root, sorted(Path(file) for file in glob.glob(pattern, recursive=True) if Path(file).is_file())


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
