"""Smoothing with the data at hand: a few training samples show how large each activation gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from qat.smoothing import smooth

SAMPLES = 32  # more of them change the maxima of channels little


def smooth_with_data(model: nn.Module, data_module: dict, alpha: float, device: torch.device) -> None:
    """`qat.smoothing.smooth` over the first training samples (rows, when packed), one at a time, without padding.

    Every process does the same. Under FSDP with `cpu_ram_efficient_loading` only the first one has weights; the others
    are given its smoothed ones when the model is sharded.

    Args:
        model: prepared by `prepare_qat`.
        data_module: from `make_supervised_data_module`.
        alpha: share of the difficulty that moves into the weights, above 0 and at most 1.
        device: where the model is moved first, and stays; unless it is to be sharded, and may be too large for it.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        model.to(device)
    smooth(model, _batches(data_module, model.device), alpha)


def _batches(data_module: dict, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    for sample in islice(iter(data_module["train_dataset"]), SAMPLES):
        batch = data_module["data_collator"]([sample])
        yield {key: value.to(device) for key, value in batch.items() if key != "labels"}
