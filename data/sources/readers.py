"""Where rows come from: named datasets, any id on the hub, local files and folders, several of them with weights.

`--dataset a.jsonl:0.7,Daring-Anteater:0.3` names two sources; `parse_sources` finds out what each is, and a `Source`
gives the rows of its splits and an identity by which a cache may know them.
"""

from __future__ import annotations

import glob
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
from .files import READERS
from .local import FILE_KINDS, LocalFiles
from .python_docs import read_python_docs
from .row import Row
from .source import Source

# name -> hub id, configuration
_HUB = {
    "Daring-Anteater": ("nvidia/Daring-Anteater", None),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
}
DEFAULT_EVAL_SIZE = {"Daring-Anteater": 2000, "cnn_dailymail": 2000, "python-docs": 256}
DATASET_NAMES = ("Daring-Anteater", "cnn_dailymail", "python-docs")
HELP = (
    f"{', '.join(DATASET_NAMES)}, a hub id (`user/name`, `user/name@configuration`), or a local "
    f"{', '.join(FILE_KINDS)} file, a pattern (`data/*.jsonl`), a folder of such files or one of `save_to_disk`; "
    "several with commas and weights: `a.jsonl:0.7,Daring-Anteater:0.3`"
)


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


def _parts(spec: str) -> list[str]:
    """The datasets between commas; a comma in the path of an existing file or folder divides nothing."""
    pieces, parts = spec.split(","), []
    while pieces:
        count = next((n for n in range(len(pieces), 1, -1) if _is_path(",".join(pieces[:n]).strip())), 1)
        parts.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def _is_path(part: str) -> bool:
    name, _, weight = part.rpartition(":")
    return _exists(part) or ("," not in weight and _exists(name))


def _exists(name: str) -> bool:
    """Whether a path exists, or a pattern matches something."""
    path = os.path.expanduser(name)
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


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
    folder, _, configuration = name.rpartition("@")
    if os.path.isdir(os.path.expanduser(folder)):
        return LocalFiles(name, weight, requested, argument, configuration)
    if name in _HUB:
        return HubDataset(name, weight, *_HUB[name], streaming)
    looks_local = kind_of(Path(name)) in READERS or name.startswith((".", "/", "~"))
    if looks_local or name.count("/") != 1:
        raise UserError(f"--{argument} {name!r} is neither a known dataset nor an existing path; known are {HELP}")
    hub_id, _, configuration = name.partition("@")
    return HubDataset(name, weight, hub_id, configuration or None, streaming)
