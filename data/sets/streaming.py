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
from typing import NoReturn

import datasets
import pyarrow as pa

from qat.errors import UserError

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.formatting import Encoded, Formatter
from ..sources.readers import Source
from .building import refuse_nothing, to_record_batch
from .packing import pack, plan_packing
from .samples import SurveyedPart, read_samples, survey
from .totals import Totals, describe_left_out, describe_notes, describe_splits

logger = logging.getLogger(__name__)

BUFFER_SAMPLES = 2048  # of which the next sample is drawn at random
DEFAULT_EVAL_SIZE = 256
_ENCODE_BATCH, _PACK_BATCH = 64, 512
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
    seed: int = 42,
) -> tuple[datasets.IterableDataset, datasets.Dataset | None]:
    """A stream of training samples in an order that `seed` decides, and the evaluation set.

    Without an evaluation set of their own, the first `eval_size` good samples of the first source are held out of the
    stream, all their copies included. With `evaluation` empty, or only one sample, nothing is held out.

    Raises:
        UserError: sizes given as fractions, weights on some, a bad sample or an unknown schema at the beginning, files
            of different schemas, more samples to hold out than there are.
    """
    for argument, size in (("train_size", train_size), ("eval_size", eval_size)):
        if 0 < size < 1:
            raise UserError(f"--{argument} {size:g}: a stream has no known length; give a number of samples")
    policy = LoggedPolicy(policy.policy)
    surveys = [_surveyed(entry) for entry in train]
    own = [_surveyed(entry) for entry in evaluation if entry is not None]
    if own:
        held_out, hashes = _taken(own, int(eval_size) or DEFAULT_EVAL_SIZE, formatter, policy)
    elif evaluation:
        held_out, hashes = _held_out(surveys[0], train[0][0].name, int(eval_size), formatter, policy)
    else:
        held_out, hashes = None, set()
    parts = [_stream_of(survey, hashes, bool(own), policy) for survey in surveys]
    weights = [source.weight for source, _ in train]
    if weights[0] is not None:
        probabilities = [weight / sum(weights) for weight in weights]
        stream = datasets.interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="first_exhausted")
    else:
        stream = datasets.concatenate_datasets(parts)
    if train_size:
        stream = stream.take(int(train_size))
    stream = stream.shuffle(seed=seed, buffer_size=BUFFER_SAMPLES)
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


def _surveyed(entry: tuple[Source, str]) -> list[SurveyedPart]:
    source, split = entry
    found = survey(source.parts(split))
    for note in found.notes:
        logger.info("%s: %s", source.name, note)
    if not found.parts:
        raise UserError(f"{source.name} ({split}) has no usable sample. {'; '.join(found.notes)}")
    return found.parts


def _stream_of(parts: list[SurveyedPart], held_out: set[bytes], is_error: bool, policy: BadSamplePolicy):
    arguments = {"parts": parts, "held_out": held_out, "is_error": is_error, "policy": policy}
    features = datasets.Features({"place": datasets.Value("string"), "sample": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(_generate, features, gen_kwargs=arguments)


def _generate(
    parts: list[SurveyedPart], held_out: set[bytes], is_error: bool, policy: BadSamplePolicy
) -> Iterator[dict]:
    passed_over = 0
    for place, text in read_samples(parts, policy):
        if _hash(text) not in held_out:
            yield {"place": place, "sample": text}
        elif is_error:
            policy.handle(BadSample("duplicate of an evaluation sample", "", place))
        else:
            passed_over += 1
    logger.info("end of %s: skipped %d samples held out for evaluation", parts[0][0].name, passed_over)
    if policy.total:
        logger.warning(policy.report())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# ---- The evaluation set ----


def _taken(
    sets: list[list[SurveyedPart]], count: int, formatter: Formatter, policy: BadSamplePolicy
) -> tuple[datasets.Dataset, set[bytes]]:
    """The first `count` different samples of evaluation sets."""
    totals = Totals()
    samples = list(itertools.islice(_different(itertools.chain(*sets), formatter, policy, totals), count))
    if not samples:
        _refuse("no usable sample to evaluate on", totals, formatter, policy)
    return _as_dataset(samples)


def _refuse(what: str, totals: Totals, formatter: Formatter, policy: BadSamplePolicy) -> NoReturn:
    if totals.left_out_samples:
        refuse_nothing(totals, formatter.max_length, f"{totals.left_out_samples} samples read", policy)
    raise UserError(f"{what}. {policy.report()}")


def _held_out(
    parts: list[SurveyedPart], name: str, size: int, formatter: Formatter, policy: BadSamplePolicy
) -> tuple[datasets.Dataset | None, set[bytes]]:
    """The first `size` different samples of a training set, of which one at least is left; 0: the default."""
    wanted = size or DEFAULT_EVAL_SIZE
    totals = Totals()
    samples = list(itertools.islice(_different(iter(parts), formatter, policy, totals), wanted + 1))
    if not samples:
        _refuse(f"{name} has no usable sample", totals, formatter, policy)
    if size and len(samples) <= size:
        raise UserError(f"--eval_size {size} is more than {name} can give: {len(samples) - 1} samples are available")
    if len(samples) <= wanted:  # a small set, of which a tenth is held out, as without --streaming
        wanted = min(max(1, len(samples) // 10), len(samples) - 1)
    return _as_dataset(samples[:wanted]) if wanted else (None, set())


def _as_dataset(samples: list[tuple[bytes, list[Encoded]]]) -> tuple[datasets.Dataset, set[bytes]]:
    table = pa.Table.from_batches([to_record_batch([sample for _, encoded in samples for sample in encoded])])
    return datasets.Dataset(table), {key for key, _ in samples}


def _different(
    parts: Iterator[SurveyedPart], formatter: Formatter, policy: BadSamplePolicy, totals: Totals
) -> Iterator[tuple[bytes, list[Encoded]]]:
    """Each good conversation once: its hash and its samples, which are counted."""
    seen: set[bytes] = set()
    for place, text in read_samples(parts, policy):
        key = _hash(text)
        if key in seen:
            continue
        [encoded] = formatter.encode([json.loads(text)])
        if isinstance(encoded, BadSample):
            policy.handle(encoded.at(place))
        elif samples := totals.add(encoded):
            seen.add(key)
            yield key, samples
