"""Summarize the training data in a few lines: samples, tokens, labelled tokens, truncated samples, padding."""

from __future__ import annotations

import numpy as np


def padding_fraction(lengths: np.ndarray, batch_size: int, seed: int = 0) -> float:
    """The fraction of padding in batches of `batch_size` random samples, each padded to its longest; 0 to 1."""
    order = np.random.default_rng(seed).permutation(np.asarray(lengths, dtype=np.int64))
    whole = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    rest = order[whole.size :]
    padded = whole.max(axis=1).sum() * batch_size if len(whole) else 0
    padded += rest.max() * len(rest) if len(rest) else 0
    return 1 - float(order.sum()) / float(padded)


def describe_set(
    name: str, totals: dict, lengths: np.ndarray, batch_size: int, max_length: int, rows: int | None = None
) -> str:
    """One line about a set.

    Args:
        totals: see `data.sets.building.Totals`.
        rows: of `max_length` tokens, where the samples were packed.
    """
    text = (
        f"{name}: {totals['samples']:,} samples, {totals['tokens']:,} tokens, "
        f"{totals['labelled_tokens'] / totals['tokens']:.1%} of them labelled, "
        f"{totals['truncated_samples']:,} samples truncated at {max_length}, "
    )
    waste = f"{padding_fraction(lengths, batch_size):.1%} padding in batches of {batch_size}"
    if rows is None:
        return text + waste
    padding = 1 - totals["tokens"] / (rows * max_length)
    return text + f"packed into {rows:,} rows with {padding:.1%} padding (unpacked: {waste})"
