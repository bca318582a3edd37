"""Text from elsewhere for the divergence from a teacher: whole texts and conversations, cut into pieces.

Nothing is truncated: a sample longer than `max_length` tokens becomes several pieces that follow each other. A .txt
file is one document, whatever its lines are; other rows are read as those of a training set.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qat.errors import UserError
from qat.files.build_once import build_once

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.encoding import Encoded
from ..conversations.formatting import IGNORE_INDEX, Formatter
from ..sources.compressed import kind_of, open_bytes
from ..sources.files import TEXT_KIND, read_file
from ..sources.readers import parse_sources
from ..sources.row import Row
from ..sources.source import FilePart, Source
from ..sources.splits import first_of
from .building import SCHEMA, build, to_record_batch
from .cache import default_root, fingerprint
from .selection import collect

_BLOCK = 2**20  # characters of a .txt file that are tokenized at a time, up to the end of a line
_WHOLE = 2**30  # tokens at which samples are cut before they are cut into pieces: none is as long


def read_generic(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    argument: str = "distill_generic",
    *,
    chat_template: str | None = None,
    train_on: str = "assistant",
    on_bad_sample: str = "error",
    data_cache_dir: str | None = None,
    preprocessing_num_workers: int = 0,
) -> datasets.Dataset:
    """The pieces of all texts and conversations that `spec` names: columns `input_ids`, `labels`, `length`.

    Every token of a text but the first of a piece is labelled, of a conversation those that `train_on` says.

    Args:
        spec: written like --dataset, without weights; of each dataset the split "train", or the first one.
        tokenizer: pieces have at most its `model_max_length` tokens. Its chat template is set already.
        argument: of which `spec` is the value, for messages.

    Raises:
        UserError: `spec` names nothing that can be read, or there is no labelled token in it.
    """
    sources = parse_sources(spec, argument)
    if any(source.weight is not None for source in sources):
        raise UserError(f"--{argument} {spec!r}: weights have no effect here, all of it is read; leave them out")
    chosen = [(_WholeTexts(source), first_of(source.splits(), "train") or source.splits()[0]) for source in sources]
    formatter = Formatter(tokenizer, _WHOLE, train_on, chat_template)
    length, policy = tokenizer.model_max_length, BadSamplePolicy(on_bad_sample)
    names = [[source.name, split, source.identity(split)] for source, split in chosen]
    key = fingerprint({"generic": names, "format": formatter.fingerprint, "length": length, "policy": on_bad_sample})

    def fill(folder: Path) -> None:
        pools = [collect(source, split, folder / f"raw-{i}", policy) for i, (source, split) in enumerate(chosen)]
        rows = datasets.concatenate_datasets([pool.rows for pool in pools])
        build(rows, folder / "whole.arrow", formatter, policy, f"samples of --{argument}", preprocessing_num_workers)
        _write_pieces(datasets.Dataset.from_file(str(folder / "whole.arrow")), folder / "pieces.arrow", length)
        (folder / "summary.json").write_text(json.dumps({"skipped": policy.report()}) + "\n", encoding="utf-8")
        for path in (*folder.glob("raw-*"), folder / "whole.arrow"):
            path.unlink()

    folder = build_once(Path(data_cache_dir) if data_cache_dir else default_root(), key, fill)
    pieces = datasets.Dataset.from_file(str(folder / "pieces.arrow"))
    if not len(pieces):
        raise UserError(f"--{argument} {spec!r} has no token to learn; give a text of at least two tokens")
    return pieces


def pieces_of(input_ids: np.ndarray, labels: np.ndarray, length: int) -> Iterator[Encoded]:
    """Cut a sample, int [tokens], into pieces of at most `length` tokens; those without a labelled token are left out.

    The first token of a piece has no label, since nothing predicts it there.
    """
    for start in range(0, len(input_ids), length):
        part = np.array(labels[start : start + length], dtype=np.int32)
        part[:1] = IGNORE_INDEX
        if (part != IGNORE_INDEX).any():
            yield Encoded(np.array(input_ids[start : start + length], dtype=np.int32), part, False)


def _write_pieces(samples: datasets.Dataset, path: Path, length: int) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for sample in samples.with_format("numpy"):
            if pieces := list(pieces_of(sample["input_ids"], sample["labels"], length)):
                writer.write_batch(to_record_batch(pieces))


class _WholeTexts(Source):
    """A source whose .txt files are documents; whatever else it has is read as it is."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.name)
        self._source = source

    def splits(self) -> tuple[str, ...]:
        return self._source.splits()

    def rows(self, split: str) -> Iterator[Row]:
        for part in self.parts(split):
            yield from part.rows()

    def parts(self, split: str) -> list:
        return [
            _Document(**vars(part)) if isinstance(part, FilePart) and kind_of(part.path) == TEXT_KIND else part
            for part in self._source.parts(split)
        ]

    def identity(self, split: str) -> str:
        return self._source.identity(split)


@dataclasses.dataclass(frozen=True)
class _Document(FilePart):
    """A .txt file as one text, in blocks where it is long."""

    def rows(self) -> Iterator[Row]:
        for place, row in read_file(self.path):
            if isinstance(row, BadSample):
                yield place, row
                return
        with open_bytes(self.path) as file:
            while block := file.read(_BLOCK):
                yield str(self.path), {"text": (block + file.readline()).decode("utf-8").removeprefix("\ufeff")}
