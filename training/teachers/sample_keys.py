"""Keys of samples by content: their tokens and labels.

A teacher's distributions depend on a sample's tokens, and which of them are kept depends on its labels. So the two are
the key of a sample, whether it stands alone, in a packed row or in a padded batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.conversations.formatting import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """The tokens of one sample up to its last labelled one, and which of them are labelled."""

    ids: np.ndarray
    labelled: np.ndarray

    @property
    def key(self) -> bytes:
        """16 bytes that stand for the content."""
        content = self.ids.astype("<i8").tobytes() + self.labelled.tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()

    @property
    def count(self) -> int:
        """Labelled tokens that something predicts: not the first."""
        return int(self.labelled[1:].sum())


def samples_of(row: dict) -> Iterator[Sample]:
    """The samples in a row of a data set or of a batch (`input_ids`, `labels`, packed: `position_ids`), in order.

    Padding and samples without labelled tokens are left out.
    """
    ids, labelled = np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORE_INDEX
    starts = np.flatnonzero(np.asarray(row["position_ids"]) == 0).tolist() if "position_ids" in row else [0]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        marked = np.flatnonzero(labelled[start + 1 : end])
        if len(marked):
            end = start + 1 + int(marked[-1]) + 1
            mask = labelled[start:end].copy()
            mask[0] = False  # nothing predicts it
            yield Sample(ids[start:end], mask)


def weights_digest(model: nn.Module) -> str:
    """A digest of all parameters and of the config: whatever a model's output depends on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
