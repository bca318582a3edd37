"""Which samples are trained on and which are held out: collected from the sources, sized, weighted, disjoint, shuffled.

Samples are collected into one Arrow file per split, so that memory holds eight bytes of each (a hash) and no text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from qat.errors import UserError

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.schemas import Schema, recognise, unknown_schema
from ..conversations.turns import unread
from ..sources.readers import DEFAULT_EVAL_SIZE, Source

logger = logging.getLogger(__name__)

SPLIT_SEED = 42
_SCHEMA = pa.schema([("sample", pa.string()), ("place", pa.string())])
_WRITE_EVERY = 256


@dataclass
class Pool:
    """The good samples of one split of one source: their rows (JSON text, place) and a 64-bit hash of each."""

    source: Source
    rows: datasets.Dataset
    hashes: np.ndarray  # uint64 [samples]
    schema: Schema

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass
class Chosen:
    """Samples taken from pools, in order."""

    parts: list[tuple[Pool, np.ndarray]] = field(default_factory=list)  # int64 indices into the pool

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [samples]"""
        return np.concatenate([pool.hashes[i] for pool, i in self.parts]) if self.parts else np.empty(0, np.uint64)

    def rows(self) -> datasets.Dataset:
        """The samples themselves; several sources are shuffled together."""
        rows = datasets.concatenate_datasets([pool.rows.select(indices) for pool, indices in self.parts])
        return rows.shuffle(seed=SPLIT_SEED, keep_in_memory=True) if len(self.parts) > 1 else rows


def collect(source: Source, split: str, path: Path, policy: BadSamplePolicy) -> Pool:
    """Read a whole split, check every row, and keep the good ones in the Arrow file `path`.

    Raises:
        UserError: an unknown schema, no good row at all, or (policy "error") the first bad sample.
    """
    schema: Schema | None = None
    hashes, texts, places = array("Q"), [], []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for place, row in tqdm(source.rows(split), desc=f"Reading {source.name} ({split})", unit=" samples"):
            try:
                if isinstance(row, BadSample):
                    raise row
                if schema is None:
                    schema = recognise(row)
                    if schema is None:
                        raise unknown_schema(row, place)
                text = json.dumps(schema.sample_of(row), ensure_ascii=False)
                policy.note_unread(unread(row, schema.required | schema.optional))
            except BadSample as error:
                policy.handle(error.at(place))
                continue
            texts.append(text)
            places.append(place)
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
            if len(texts) == _WRITE_EVERY:
                writer.write_batch(pa.record_batch([texts, places], schema=_SCHEMA))
                texts, places = [], []
        if texts:
            writer.write_batch(pa.record_batch([texts, places], schema=_SCHEMA))
    if schema is None or not hashes:
        raise UserError(f"{source.name} ({split}) has no usable sample. {policy.report() or 'It has no rows'}")
    return Pool(source, datasets.Dataset.from_file(str(path)), np.array(hashes, dtype=np.uint64), schema)


def split_pools(
    pools: list[Pool],
    held_out: list[Pool | None],
    train_size: float,
    eval_size: float,
    policy: BadSamplePolicy,
) -> tuple[Chosen, Chosen]:
    """Training and evaluation samples, disjoint also in content.

    Args:
        pools: one per source of the training set.
        held_out: beside each, the pool that evaluates it, or None to hold samples out of the pool itself; or any number
            of evaluation pools of their own.
        train_size, eval_size: numbers of samples; between 0 and 1, fractions; 0, all and the default.

    Raises:
        UserError: sizes that the data cannot give; a sample in both sets (policy "error").
    """
    rng = np.random.default_rng(SPLIT_SEED)
    orders = [rng_order(len(pool)) for pool in pools]
    evaluation = Chosen()
    quotas = _eval_quotas(pools, held_out, eval_size)
    _, inverse, counts = np.unique(np.concatenate([p.hashes for p in pools]), return_inverse=True, return_counts=True)
    occurs_once = np.split(counts[inverse.reshape(-1)] == 1, np.cumsum([len(p) for p in pools])[:-1])
    for i, quota in enumerate(quotas):
        pool = held_out[i]
        if pool is not None:
            _check_size("eval_size", quota, len(pool), pool.source.name)
            evaluation.parts.append((pool, rng_order(len(pool))[:quota]))
            continue
        # A sample that occurs twice must not be in both sets, so only those that occur once are held out.
        candidates = orders[i][occurs_once[i][orders[i]]]
        _check_size("eval_size", quota, min(len(candidates), len(pools[i]) - 1), pools[i].source.name)
        taken = candidates[len(candidates) - quota :]
        evaluation.parts.append((pools[i], taken))
        orders[i] = orders[i][~np.isin(orders[i], taken)]
    evaluation.parts = [part for part in evaluation.parts if len(part[1])]
    orders = _without_duplicates(pools, orders, evaluation, policy)
    train = Chosen([(p, o) for p, o in zip(pools, _sized(pools, orders, train_size, rng), strict=True) if len(o)])
    return train, evaluation


def rng_order(count: int) -> np.ndarray:
    """The fixed shuffle of `count` samples: int64 [count]."""
    return np.random.default_rng(SPLIT_SEED).permutation(count)


def _eval_quotas(pools: list[Pool], held_out: list[Pool | None], eval_size: float) -> list[int]:
    available = [len(own if own is not None else pools[i]) for i, own in enumerate(held_out)]
    if eval_size == 0:
        quotas = []
        for i, own in enumerate(held_out):
            name = (own or pools[i]).source.name
            default = DEFAULT_EVAL_SIZE.get(name, available[i] if own is not None else max(1, available[i] // 10))
            quotas.append(min(default, available[i]) if own is not None else default)
        return quotas
    if eval_size < 1:
        return [max(1, round(eval_size * count)) for count in available]
    weights = [(own or pools[i]).source.weight for i, own in enumerate(held_out)]
    return _apportion(int(eval_size), [w if w is not None else n for w, n in zip(weights, available, strict=True)])


def _sized(
    pools: list[Pool], orders: list[np.ndarray], train_size: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Samples per pool by size and weights; with weights, as many as possible without repeating any."""
    available = [len(order) for order in orders]
    weights = [pool.source.weight for pool in pools]
    if weights[0] is not None:
        most = min(int(n * sum(weights) / w + 1e-9) for n, w in zip(available, weights, strict=True))
        total = _total(train_size, most, "the datasets in these weights, none repeated,")
        return [order[:count] for order, count in zip(orders, _apportion(total, weights), strict=True)]
    total = _total(train_size, sum(available), " and ".join(pool.source.name for pool in pools))
    if total == sum(available) or len(pools) == 1:
        return [order[:total] for order in orders]
    owner = rng.permutation(np.repeat(np.arange(len(pools)), available))[:total]
    return [order[: int((owner == i).sum())] for i, order in enumerate(orders)]


def _total(train_size: float, available: int, name: str) -> int:
    total = available if train_size == 0 else int(train_size)
    if 0 < train_size < 1:
        total = round(train_size * available)
    _check_size("train_size", total, available, name)
    if total == 0:
        raise UserError(f"--train_size {train_size:g} leaves no training sample of the {available} that {name} has")
    return total


def _check_size(argument: str, size: int, available: int, name: str) -> None:
    if size > available:
        raise UserError(f"--{argument} {size} is more than {name} can give: {max(available, 0)} samples are available")


def _apportion(total: int, weights: list[float]) -> list[int]:
    """`total` in whole parts proportional to `weights`: the largest remainders are rounded up."""
    exact = np.array(weights, dtype=float) * total / sum(weights)
    parts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(parts - exact, kind="stable")[: total - parts.sum()]:
        parts[i] += 1
    return parts.tolist()


def _without_duplicates(
    pools: list[Pool], orders: list[np.ndarray], evaluation: Chosen, policy: BadSamplePolicy
) -> list[np.ndarray]:
    """Training samples whose content is in the evaluation set leave the training set."""
    held_out = evaluation.hashes
    result = []
    for pool, order in zip(pools, orders, strict=True):
        is_duplicate = np.isin(pool.hashes[order], held_out)
        for index in order[is_duplicate]:
            detail = f"one of {is_duplicate.sum()} training samples that the evaluation set has too"
            policy.handle(BadSample("duplicate of an evaluation sample", detail, pool.rows[int(index)]["place"]))
        result.append(order[~is_duplicate])
    return result
