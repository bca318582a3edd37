"""Which samples are trained on and which are held out: collected from the sources, sized, weighted, disjoint, shuffled.

Samples are collected into one Arrow file per split, so that memory holds eight bytes of each (a hash) and no text.
"""

from __future__ import annotations

import hashlib
import itertools
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
from ..sources.readers import DEFAULT_EVAL_SIZE, Source
from .samples import Begun, read_samples, survey

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
    notes: list[str] = field(default_factory=list)  # what the log tells about them

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass
class Chosen:
    """Samples taken from pools, in order."""

    parts: list[tuple[Pool, np.ndarray]] = field(default_factory=list)  # int64 indices into the pool
    notes: list[str] = field(default_factory=list)

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
        UserError: an unknown schema, two schemas, no good row at all, or (policy "error") the first bad sample.
    """
    parts = source.parts(split)
    found = survey(parts if len(parts) > 1 else [Begun(part) for part in parts])
    description = f"Reading {source.name} ({split})"
    samples = iter(tqdm(read_samples(found.parts, policy), desc=description, unit=" samples"))
    hashes = array("Q")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        while batch := list(itertools.islice(samples, _WRITE_EVERY)):
            places, texts = zip(*batch, strict=True)
            writer.write_batch(pa.record_batch([texts, places], schema=_SCHEMA))
            hashes.extend(_hash_of(text) for text in texts)
    if not hashes:
        nothing = policy.report() or "; ".join(found.notes) or "It has no rows"
        raise UserError(f"{source.name} ({split}) has no usable sample. {nothing}")
    pool = Pool(source, datasets.Dataset.from_file(str(path)), np.array(hashes, dtype=np.uint64), found.notes)
    if copies := len(pool) - len(np.unique(pool.hashes)):
        pool.notes.append(f"{copies} of {len(pool)} samples are copies of others")
    return pool


def _hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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
            of evaluation pools of their own. With none at all, or where all samples are alike, nothing is held out.
        train_size, eval_size: numbers of samples; between 0 and 1, fractions; 0, all and the default.

    Raises:
        UserError: sizes that the data cannot give; a sample in both sets (policy "error").
    """
    rng = np.random.default_rng(SPLIT_SEED)
    orders = [rng_order(len(pool)) for pool in pools]
    evaluation = Chosen()
    left_out = 0
    for i, quota in enumerate(_eval_quotas(pools, held_out, eval_size)):
        pool = held_out[i]
        if pool is not None:
            _check_size("eval_size", eval_size, quota, len(pool), pool.source.name, policy)
            evaluation.parts.append((pool, rng_order(len(pool))[:quota]))
            continue
        most = max(0, len(np.unique(pools[i].hashes[orders[i]])) - 1)
        if eval_size == 0:
            quota = min(quota, most)
        _check_size("eval_size", eval_size, quota, most, pools[i].source.name, policy)
        taken = _hold_out(pools, orders, i, quota)
        evaluation.parts.append((pools[i], taken))
        lengths = sum(map(len, orders))
        orders = [o[~np.isin(p.hashes[o], pools[i].hashes[taken])] for p, o in zip(pools, orders, strict=True)]
        left_out += lengths - sum(map(len, orders)) - quota
    evaluation.parts = [part for part in evaluation.parts if len(part[1])]
    if left_out:
        evaluation.notes.append(f"left {left_out} copies of held-out samples out of the training set")
    orders = _sized(pools, _without_duplicates(pools, orders, evaluation, policy), train_size, rng, policy)
    return Chosen([part for part in zip(pools, orders, strict=True) if len(part[1])]), evaluation


def _hold_out(pools: list[Pool], orders: list[np.ndarray], i: int, quota: int) -> np.ndarray:
    """`quota` different samples of pool `i`: those that occur once, and one copy of others if they are too few."""
    hashes = np.concatenate([pool.hashes[order] for pool, order in zip(pools, orders, strict=True)])
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    begin = sum(map(len, orders[:i]))
    copies = counts[inverse.reshape(-1)[begin : begin + len(orders[i])]]
    once, repeated = orders[i][copies == 1], orders[i][copies > 1]
    _, first = np.unique(pools[i].hashes[repeated], return_index=True)
    candidates = np.concatenate([repeated[np.sort(first)], once])
    return candidates[len(candidates) - quota :]


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
    if not held_out:
        return []
    return _apportion(int(eval_size), [w if w is not None else n for w, n in zip(weights, available, strict=True)])


def _sized(
    pools: list[Pool],
    orders: list[np.ndarray],
    train_size: float,
    rng: np.random.Generator,
    policy: BadSamplePolicy,
) -> list[np.ndarray]:
    """Samples per pool by size and weights; with weights, as many as possible without repeating any."""
    available = [len(order) for order in orders]
    weights = [pool.source.weight for pool in pools]
    if weights[0] is not None:
        most = min(int(n * sum(weights) / w + 1e-9) for n, w in zip(available, weights, strict=True))
        total = _total(train_size, most, "the datasets in these weights, none repeated,", policy)
        return [order[:count] for order, count in zip(orders, _apportion(total, weights), strict=True)]
    total = _total(train_size, sum(available), " and ".join(pool.source.name for pool in pools), policy)
    if total == sum(available) or len(pools) == 1:
        return [order[:total] for order in orders]
    owner = rng.permutation(np.repeat(np.arange(len(pools)), available))[:total]
    return [order[: int((owner == i).sum())] for i, order in enumerate(orders)]


def _total(train_size: float, available: int, name: str, policy: BadSamplePolicy) -> int:
    total = available if train_size == 0 else int(train_size)
    if 0 < train_size < 1:
        total = round(train_size * available)
    _check_size("train_size", train_size, total, available, name, policy)
    if total == 0:
        given = f"--train_size {train_size:g} leaves" if train_size else "the evaluation set leaves"
        raise UserError(f"{given} no training sample of the {available} that {name} has")
    return total


def _check_size(argument: str, given: float, size: int, available: int, name: str, policy: BadSamplePolicy) -> None:
    if size > available:
        asked = "" if size == given else f", which is {size},"
        raise UserError(
            f"--{argument} {given:g}{asked} is more than {name} can give: {max(available, 0)} samples are available. "
            f"{policy.report()}".rstrip(". ")
        )


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
