"""Tokenize chosen samples in parallel into one Arrow file, a batch at a time, so that memory stays flat."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from qat.errors import UserError

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.formatting import Encoded, Formatter, LeftOut
from .totals import KEPT_FRACTION, Totals
from .workers import Workers

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())])
BATCH_SAMPLES = 128
_MIN_SAMPLES_PER_WORKER = 1024  # below this, starting a process takes longer than it saves
_MAX_WORKERS = 16


def build(
    rows: datasets.Dataset,
    path: Path,
    formatter: Formatter,
    policy: BadSamplePolicy,
    description: str,
    workers: int = 0,
) -> Totals:
    """Tokenize `rows` (columns `sample`, `place`) into the Arrow stream `path`, in their order.

    Samples that truncation leaves without an answer are left out and counted, whatever the policy: the data is good.

    Args:
        workers: processes that tokenize; 0 for one per core, at most 16, and fewer for small sets. With one, the
            tokenizer's own threads share the work.

    Raises:
        UserError: the first bad sample (policy "error"), an inexact template, or nothing left.
    """
    if workers == 0:
        workers = min(cores(), _MAX_WORKERS, max(1, len(rows) // _MIN_SAMPLES_PER_WORKER))
    totals = Totals()
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
        tqdm(total=len(rows), desc=f"Tokenizing {description}", unit=" samples") as bar,
    ):
        for batch in _encode_batches(rows, formatter, workers):
            good = []
            for place, encoded in batch:
                if isinstance(encoded, BadSample):
                    policy.handle(encoded.at(place))
                else:
                    good += totals.add(encoded)
            if good:
                writer.write_batch(to_record_batch(good))
            bar.update(len(batch))
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{totals.tokens / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False)
    if not totals.samples:
        refuse_nothing(totals, formatter.max_length, f"{len(rows)} {description}", policy)
    return totals


def refuse_nothing(totals: Totals, max_length: int, what: str, policy: BadSamplePolicy) -> NoReturn:
    """Raise the UserError for a set of which no sample is left."""
    if totals.left_out_samples:
        raise UserError(
            f"--model_max_length {max_length}: none of the {what} has an answer in its first {max_length} tokens; "
            f"{totals.length_to_keep:,} tokens would keep {KEPT_FRACTION:.0%} of the samples. {policy.report()}"
        )
    raise UserError(f"no usable sample is left among the {what}. {policy.report()}")


def to_record_batch(samples: list[Encoded]) -> pa.RecordBatch:
    """Columns `input_ids`, `labels` (lists of int32) and `length`."""
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def column(name: str) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([getattr(s, name) for s in samples])))

    return pa.record_batch([column("input_ids"), column("labels"), pa.array(lengths)], schema=SCHEMA)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- Batches, in order, by this process or by several ----

Batch = list[tuple[str, "list[Encoded | LeftOut] | BadSample"]]


def _encode_batches(rows: datasets.Dataset, formatter: Formatter, workers: int) -> Iterator[Batch]:
    batches = ((b["place"], b["sample"]) for b in rows.iter(batch_size=BATCH_SAMPLES))
    if workers == 1:
        for places, texts in batches:
            yield _encode_batch(places, texts, formatter)
        return
    with Workers(functools.partial(_encode_in_worker, formatter), workers) as pool:
        yield from pool.map(batches)


def _encode_batch(places: list[str], texts: list[str], formatter: Formatter) -> Batch:
    return list(zip(places, formatter.encode([json.loads(text) for text in texts]), strict=True))


def _encode_in_worker(formatter: Formatter, batch: tuple[list[str], list[str]]) -> Batch:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    return _encode_batch(*batch, formatter)
