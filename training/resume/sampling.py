"""The order of training samples: a function of the seed and the epoch alone.

Neither what else has drawn random numbers, nor a restart, nor the number of processes (at the same number of samples a
step) changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Every sample once, in an order of its own for each epoch.

    Args:
        count: number of samples.
        seed: of the first epoch; each later one counts up.
        lengths: tokens of each sample, to group samples of about the same length; None for a plain shuffle.
        group: samples of a step, over all processes and accumulated batches.
    """

    def __init__(self, count: int, seed: int, lengths: list[int] | None = None, group: int = 1) -> None:
        self.count, self.seed, self.lengths, self.group = count, seed, lengths, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class InterleavingSampler(Sampler[int]):
    """The order of a data set that mixes rows of its own between those of a sampler.

    Args:
        sampler: of the rows that an epoch counts.
        interleave: its order and the number of the epoch -> the order of all rows.
        count: of all rows of an epoch.
    """

    def __init__(self, sampler: EpochSampler, interleave: Callable[[list[int], int], list[int]], count: int) -> None:
        self.sampler, self.interleave, self.count = sampler, interleave, count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.interleave(list(self.sampler), self.sampler.epoch))


def lengths_of(dataset: Dataset, column: str) -> list[int]:
    """Tokens of each sample: its column of a `datasets.Dataset`, else counted by reading every sample."""
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
