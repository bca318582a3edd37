"""Batches: samples or packed rows -> padded tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..conversations.formatting import IGNORE_INDEX
from .mixing import COLUMN


@dataclass
class SupervisedCollator:
    """Pads a batch to its longest sample, on the right; padding has no label, whatever its token is.

    Samples get an attention mask that leaves padding out. Packed rows (with `position_ids`) get none: transformers
    tells their samples apart by positions, and padding is one more sample, which nobody reads.

    Args:
        pad_token_id: the token that fills up.
        one_row: join packed rows into one of all their tokens, without padding, as flash attention needs it.
    """

    pad_token_id: int
    one_row: bool = False

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """-> int64 [batch, longest]: `input_ids`, `labels`, and `attention_mask` or `position_ids`.

        Rows of a MixedDataset have their mark of generic text, too.
        """
        columns = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        if COLUMN in samples[0]:
            columns[COLUMN] = 0
        if "position_ids" not in samples[0]:
            batch = {name: self._pad([list(s[name]) for s in samples], value) for name, value in columns.items()}
            batch["attention_mask"] = self._pad([[1] * len(s["input_ids"]) for s in samples], 0)
            return batch
        columns["position_ids"] = None
        if self.one_row:
            samples = [{name: [x for s in samples for x in s[name]] for name in columns}]
        return {name: self._pad([list(s[name]) for s in samples], value) for name, value in columns.items()}

    def _pad(self, rows: list[list[int]], value: int | None) -> torch.Tensor:
        """A value of None counts from 0 over the padding: the positions of a sample of its own."""
        longest = max(len(row) for row in rows)

        def padding(count: int) -> list[int]:
            return list(range(count)) if value is None else [value] * count

        return torch.tensor([row + padding(longest - len(row)) for row in rows])
