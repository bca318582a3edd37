"""Training samples read, formatted and packed while training runs, for sets larger than the disk.

`datasets.IterableDataset` shuffles (within a buffer), mixes by weight and divides the files among processes; the
evaluation set is small, so it is tokenized at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator

import datasets
import pyarrow as pa

from qat.errors import UserError

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.formatting import Encoded, Formatter
from ..conversations.schemas import Schema, recognise, unknown_schema
from ..conversations.turns import unread
from ..sources.files import read_file
from ..sources.readers import LocalFiles, Source
from .building import refuse_nothing, to_record_batch
from .packing import pack, plan_packing
from .totals import Totals, describe_left_out, describe_notes, describe_splits

logger = logging.getLogger(__name__)

BUFFER_SAMPLES = 2048  # of which the next sample is drawn at random
DEFAULT_EVAL_SIZE = 256
_ENCODE_BATCH, _PACK_BATCH = 64, 512
_SEED = 42
_TOKENS = datasets.List(datasets.Value("int32"))


class LoggedPolicy(BadSamplePolicy):
    """Log bad samples of a stream, which has no end: the first three at once, then each doubling of their number."""

    def handle(self, error: BadSample) -> None:
        super().handle(error)
        if self.total <= 3:
            logger.warning("skipped a bad sample: %s", error)
        elif self.total & (self.total - 1) == 0:
            logger.warning(self.report())

    def note_unread(self, names: set[str]) -> None:
        new = names - self.unread.keys()
        super().note_unread(names)
        if new:
            logger.warning(self.unread_report())


def make_stream(
    train: list[tuple[Source, str]],
    evaluation: list[tuple[Source, str] | None],
    train_size: float,
    eval_size: float,
    formatter: Formatter,
    policy: BadSamplePolicy,
    packing: bool,
) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """A stream of training samples, and the evaluation set.

    Without an evaluation set of their own, the first `eval_size` good samples of the first source are held out of the
    stream, all their copies included.

    Raises:
        UserError: sizes given as fractions, weights on some, a bad sample or an unknown schema at the beginning.
    """
    for argument, size in (("train_size", train_size), ("eval_size", eval_size)):
        if 0 < size < 1:
            raise UserError(f"--{argument} {size:g}: a stream has no known length; give a number of samples")
    policy = LoggedPolicy(policy.policy)
    own = [entry for entry in evaluation if entry is not None]
    rows = itertools.chain.from_iterable(_samples([entry], policy) for entry in own or train[:1])
    held_out, hashes = _held_out(rows, int(eval_size) or DEFAULT_EVAL_SIZE, formatter, policy)
    parts = [_stream_of(entry, hashes, bool(own), policy) for entry in train]
    weights = [source.weight for source, _ in train]
    if weights[0] is not None:
        probabilities = [weight / sum(weights) for weight in weights]
        stream = datasets.interleave_datasets(parts, probabilities, seed=_SEED, stopping_strategy="first_exhausted")
    else:
        stream = datasets.concatenate_datasets(parts)
    if train_size:
        stream = stream.take(int(train_size))
    stream = stream.shuffle(seed=_SEED, buffer_size=BUFFER_SAMPLES)
    columns = {"input_ids": _TOKENS, "labels": _TOKENS}
    stream = stream.map(
        _Encode(formatter, policy), batched=True, batch_size=_ENCODE_BATCH, remove_columns=["sample", "place"],
        features=datasets.Features(columns),
    )  # fmt: skip
    if packing:
        features = datasets.Features({**columns, "position_ids": _TOKENS})
        stream = stream.map(_Pack(formatter.max_length), batched=True, batch_size=_PACK_BATCH, features=features)
    return stream, held_out


class _Encode:
    def __init__(self, formatter: Formatter, policy: BadSamplePolicy) -> None:
        self.formatter, self.policy = formatter, policy
        self.totals, self.logged = Totals(), 0

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        good = []
        encoded = self.formatter.encode([json.loads(text) for text in rows["sample"]])
        for place, sample in zip(rows["place"], encoded, strict=True):
            if isinstance(sample, BadSample):
                self.policy.handle(sample.at(place))
            else:
                good += self.totals.add(sample)
        self._log()
        return {name: [getattr(sample, name).tolist() for sample in good] for name in ("input_ids", "labels")}

    def _log(self) -> None:
        """What is left out, split or dropped, at first and at each doubling."""
        totals = self.totals
        count = totals.left_out_samples + totals.split_conversations + len(totals.notes)
        if count < max(1, 2 * self.logged):
            return
        self.logged, numbers = count, totals.as_dict()
        left_out, _ = describe_left_out("stream so far", numbers, self.formatter.max_length)
        for line in (left_out, describe_splits("stream so far", numbers), describe_notes("stream so far", numbers)):
            if line:
                logger.warning(line)


class _Pack:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        pairs = zip(columns["input_ids"], columns["labels"], strict=True)
        samples = [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in pairs]
        rows = plan_packing([len(sample["input_ids"]) for sample in samples], self.capacity)
        packed = [pack([samples[i] for i in row]) for row in rows]
        return {name: [row[name] for row in packed] for name in ("input_ids", "labels", "position_ids")}


# ---- Samples of the common form ----


def _samples(shards: list[tuple], policy: BadSamplePolicy) -> Iterator[tuple[str, str]]:
    """(place, JSON text) of each good row."""
    schema: Schema | None = None
    for source, split, *file in shards:
        for place, row in read_file(file[0]) if file else source.rows(split):
            try:
                if isinstance(row, BadSample):
                    raise row
                schema = schema or recognise(row)
                if schema is None:
                    raise unknown_schema(row, place)
                text = json.dumps(schema.sample_of(row), ensure_ascii=False)
                policy.note_unread(unread(row, schema.required | schema.optional))
                yield place, text
            except BadSample as error:
                policy.handle(error.at(place))


def _stream_of(entry: tuple[Source, str], held_out: set[bytes], is_error: bool, policy: BadSamplePolicy):
    source, split = entry
    shards = [(source, split, file) for file in source.files(split)] if isinstance(source, LocalFiles) else [entry]
    arguments = {"shards": shards, "held_out": held_out, "is_error": is_error, "policy": policy}
    features = datasets.Features({"place": datasets.Value("string"), "sample": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(_generate, features, gen_kwargs=arguments)


def _generate(shards: list[tuple], held_out: set[bytes], is_error: bool, policy: BadSamplePolicy) -> Iterator[dict]:
    passed_over = 0
    for place, text in _samples(shards, policy):
        if _hash(text) not in held_out:
            yield {"place": place, "sample": text}
        elif is_error:
            policy.handle(BadSample("duplicate of an evaluation sample", "", place))
        else:
            passed_over += 1
    logger.info("end of %s: skipped %d samples held out for evaluation", shards[0][0].name, passed_over)
    if policy.total:
        logger.warning(policy.report())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _held_out(
    rows: Iterator, count: int, formatter: Formatter, policy: BadSamplePolicy
) -> tuple[datasets.Dataset, set[bytes]]:
    good: list[Encoded] = []
    totals = Totals()
    hashes: set[bytes] = set()
    for place, text in rows:
        if _hash(text) in hashes:
            continue
        [encoded] = formatter.encode([json.loads(text)])
        if isinstance(encoded, BadSample):
            policy.handle(encoded.at(place))
        elif samples := totals.add(encoded):
            hashes.add(_hash(text))
            good += samples
        if len(good) >= count:
            break
    if not good and totals.left_out_samples:
        refuse_nothing(totals, formatter.max_length, f"{totals.left_out_samples} samples read", policy)
    if not good:
        raise UserError(f"no usable sample to evaluate on. {policy.report()}")
    return datasets.Dataset(pa.Table.from_batches([to_record_batch(good)])), hashes
