"""Smoothing with the data at hand: a few training samples show how large each activation gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from data.packing import needs_one_row
from qat.smoothing import smooth

from .weightless import first_process_loads

logger = logging.getLogger(__name__)

SAMPLES, TOKENS = 32, 512  # more samples, and more tokens of each, change the maxima of channels little


def smooth_with_data(model: nn.Module, data_module: dict, alpha: float, device: torch.device) -> None:
    """`qat.smoothing.smooth` over the beginnings of the first training samples (rows, when packed: those are the ones
    of the longest samples), without padding.

    Every process does the same. Under FSDP with `cpu_ram_efficient_loading` only the first one has weights; the others
    are given its smoothed ones when the model is sharded.

    Args:
        model: prepared by `prepare_qat`.
        data_module: from `make_supervised_data_module`.
        alpha: share of the difficulty that moves into the weights, above 0 and at most 1.
        device: where the model is moved first, and stays; unless it is to be sharded: then it computes there, if it
            fits, and is back where it was afterwards.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        model.to(device)
    with _computing_on(model, device), _attention_in_fp32(model):
        smooth(model, _batches(data_module, model.device), alpha)


@contextmanager
def _computing_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have `model` on `device` inside, or else, with a warning, on the CPU with all its cores."""
    home, threads = model.device, torch.get_num_threads()
    try:
        if home.type != device.type and (needed := _bytes(model)) <= (free := _free_bytes(device)):
            model.to(device)
        elif home.type != device.type:
            processes = 1 if first_process_loads() else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(threads, (os.cpu_count() or 1) // processes))
            logger.warning(
                "smoothing runs on the CPU and may take long: the model takes %.1f GiB in FP32, and %s has %.1f GiB "
                "free. Take a device with more memory, or --smooth_alpha 0",
                needed / 2**30, device, free / 2**30,
            )  # fmt: skip
        yield
    finally:
        model.to(home)
        torch.set_num_threads(threads)


def _bytes(model: nn.Module) -> int:
    """Parameters and buffers, and a tenth of it for what is computed."""
    return int(1.1 * sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))


def _free_bytes(device: torch.device) -> int:
    """Of a GPU's memory; 0 where that is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


@contextmanager
def _attention_in_fp32(model: nn.Module) -> Iterator[None]:
    """Let sdpa stand in for flash attention, which computes in 16 bits and on GPUs only."""
    name = model.config._attn_implementation
    if not needs_one_row(model):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _batches(data_module: dict, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    for sample in islice(iter(data_module["train_dataset"]), SAMPLES):
        beginning = {name: column[:TOKENS] for name, column in sample.items() if name != "length"}
        batch = data_module["data_collator"]([beginning])
        yield {key: value.to(device) for key, value in batch.items() if key != "labels"}
