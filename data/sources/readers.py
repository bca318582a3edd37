"""Where rows come from: named datasets, any id on the hub, local files and folders, several of them with weights.

`--dataset a.jsonl:0.7,Daring-Anteater:0.3` names two sources; `parse_sources` finds out what each is, and a `Source`
gives the rows of its splits and an identity by which a cache may know them.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from qat.errors import UserError

from ..bad_samples import BadSample
from .files import READERS, Row, read_file
from .python_docs import read_python_docs

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
    f"{', '.join(FILE_KINDS)} file or a folder of them; several with commas and weights: "
    "`a.jsonl:0.7,Daring-Anteater:0.3`"
)


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

    def identity(self, split: str) -> str:
        """A string that changes whenever the rows of that split may."""
        raise NotImplementedError


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
    """A file is the split "train"; in a folder, files whose names begin with a split's name are that split."""

    requested: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        path = Path(self.name)
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and p.name[0] != "."]
        known = [p for p in files if p.suffix.lower() in READERS]
        if not known:
            found = ", ".join(sorted({p.suffix or p.name for p in files})[:8]) or "nothing"
            raise UserError(f"--dataset {self.name}: found {found}; give files among {', '.join(FILE_KINDS)}")
        names = dict.fromkeys((*self.requested, "validation", "test"))
        self._files: dict[str, list[Path]] = {"train": []}
        for file in known:
            split = next((n for n in names if path.is_dir() and file.name.startswith(n)), "train")
            self._files.setdefault(split, []).append(file)

    def splits(self) -> tuple[str, ...]:
        return tuple(split for split, files in self._files.items() if files)

    def rows(self, split: str) -> Iterator[Row]:
        for file in self._files[split]:
            yield from read_file(file)

    def identity(self, split: str) -> str:
        return " ".join(f"{file.name}={_hash_of(file)}" for file in self._files[split])

    def files(self, split: str) -> list[Path]:
        """The files of a split, in the order in which they are read."""
        return self._files[split]


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
        requested: names of splits that files of a folder may begin with, besides train, validation and test.
        streaming: read hub datasets as streams.

    Raises:
        UserError: no such dataset, a weight that is not a positive number, weights on some sources only.
    """
    parts = [spec] if Path(spec).exists() else [part.strip() for part in spec.split(",")]
    sources = []
    for part in parts:
        name, weight = _split_weight(part, argument)
        sources.append(_open(name, weight, argument, requested, streaming))
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"--{argument} {spec!r} gives weights to some datasets only; give one to each, or to none")
    return sources


def _split_weight(part: str, argument: str) -> tuple[str, float | None]:
    name, colon, number = part.rpartition(":")
    if Path(part).exists() or not colon:
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
    if name and Path(name).exists():
        return LocalFiles(name, weight, requested)
    if name in _HUB:
        return HubDataset(name, weight, *_HUB[name], streaming)
    looks_local = Path(name).suffix.lower() in READERS or name.startswith((".", "/", "~"))
    if looks_local or name.count("/") != 1:
        raise UserError(f"--{argument} {name!r} is neither a known dataset nor an existing path; known are {HELP}")
    hub_id, _, configuration = name.partition("@")
    return HubDataset(name, weight, hub_id, configuration or None, streaming)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
