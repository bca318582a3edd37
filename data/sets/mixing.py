"""MixedDataset: training rows of the domain, with rows of generic text between them at a fixed share."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from qat.errors import UserError

COLUMN = "generic"  # of a row and of a batch: 1 at tokens that count for the divergence from a teacher only


class MixedDataset(Dataset):
    """The rows of one epoch: those of the domain, each once, and rows of generic text.

    Of the first n rows of an epoch, floor(n * share) are generic, for every n; so a step of R rows has floor(R * share)
    or ceil(R * share) of them, whatever the batch size and the number of processes. Generic rows come in an order of
    their own, which continues over epochs and begins anew, shuffled again, when all were read.

    Args:
        domain: rows with a length, `input_ids` and `labels`, perhaps `position_ids`.
        generic: likewise, with the same columns.
        share: of the rows, between 0 and 1 and neither.
        seed: of the order of generic rows.
    """

    def __init__(self, domain, generic, share: float, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise UserError(f"--distill_generic_share {share} must lie between 0 and 1, and be neither")
        self.domain, self.generic, self.share, self.seed = domain, generic, Fraction(repr(float(share))), seed
        self.generic_rows = _rows(len(domain), self.share) - len(domain)  # of an epoch

    @property
    def everything(self) -> ConcatDataset:
        """All rows, each once: those of the domain, then all of the generic text."""
        return ConcatDataset([self.domain, self.generic])

    def __len__(self) -> int:
        return len(self.domain) + self.generic_rows

    def __getitem__(self, index: int) -> dict:
        """A row of the domain, or from len(domain) on of the generic text; `generic` says which, for each token."""
        if index >= len(self.domain) + max(self.generic_rows, len(self.generic)):
            raise IndexError(f"there is no row {index}")
        is_generic = index >= len(self.domain)
        row = self.generic[(index - len(self.domain)) % len(self.generic)] if is_generic else self.domain[index]
        return {**row, COLUMN: [int(is_generic)] * len(row["input_ids"])}

    def first(self, count: int) -> list[dict]:
        """The first rows of an epoch whose domain is not shuffled: as many generic ones between them as in training."""
        order = self.interleave(list(range(min(count, len(self.domain)))), 0)
        return [self[index] for index in order[:count]]

    def interleave(self, domain_order: list[int], epoch: int) -> list[int]:
        """The indices of the rows of an epoch, in order, given those of its rows of the domain."""
        domain, generic = iter(domain_order), iter(self._generic_order(epoch))
        rows = _rows(len(domain_order), self.share)
        counts = [n * self.share.numerator // self.share.denominator for n in range(rows + 1)]
        return [next(generic if after > before else domain) for before, after in zip(counts, counts[1:], strict=False)]

    def _generic_order(self, epoch: int) -> list[int]:
        first, count = epoch * self.generic_rows, len(self.generic)
        order: list[int] = []
        for turn in range(first // count, -(-(first + self.generic_rows) // count)):
            shuffled = np.random.default_rng([self.seed, turn]).permutation(count)
            order += shuffled[max(first - turn * count, 0) : first + self.generic_rows - turn * count].tolist()
        return [len(self.domain) + index for index in order]


def _rows(domain_rows: int, share: Fraction) -> int:
    """Rows of an epoch: the fewest of which `domain_rows` are left when floor(rows * share) are generic."""
    return int((domain_rows - 1) / (1 - share)) + 1 if domain_rows else 0
