"""The samples that smoothing and calibration read before training, and the place where the model computes on them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from data.sets.mixing import COLUMN, MixedDataset
from data.sets.packing import needs_one_row

from ..backends.weightless import first_process_loads

logger = logging.getLogger(__name__)

SAMPLES, TOKENS = 32, 512  # more samples, and more tokens of each, change the maxima of channels little
WORKSPACE = 2 << 30  # bytes beside the weights: a few logits of TOKENS x 256,000 in FP32, 0.5 GiB each


def first_samples(data_module: dict, device: torch.device, count: int = SAMPLES) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one: the beginnings of the first training samples, without padding and labels.

    When samples are packed, the first rows are those of the longest samples.

    Args:
        data_module: from `make_supervised_data_module`; of text that is mixed in, its share of the samples is read.
        device: where the tensors go.
        count: how many, at most.
    """
    rows = data_module["train_dataset"]
    for sample in rows.first(count) if isinstance(rows, MixedDataset) else islice(iter(rows), count):
        beginning = {name: column[:TOKENS] for name, column in sample.items() if name != "length"}
        batch = data_module["data_collator"]([beginning])
        yield {key: value.to(device) for key, value in batch.items() if key not in ("labels", COLUMN)}


@contextmanager
def computing_in_fp32(
    model: nn.Module, device: torch.device, what: str, remedy: str, workspace: int = WORKSPACE
) -> Iterator[None]:
    """Have `model` on `device` inside, with an attention that computes in FP32.

    A model that is to be sharded computes there if it fits, or else, with a warning, on the CPU with all its cores, and
    is back where it was afterwards. Another one stays there.

    Args:
        what: is done inside, for messages: "smoothing".
        remedy: against a long time on the CPU: "leave it off with --smooth_alpha 0".
        workspace: bytes that are needed beside the weights.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        model.to(device)
    with _computing_on(model, device, what, remedy, workspace), _attention_in_fp32(model):
        yield


@contextmanager
def weights_in_fp32(model: nn.Module) -> Iterator[None]:
    """Have the tensors of a model in FP32 inside; afterwards each is rounded once to its dtype from before."""
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    model.float()
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(dtypes[name])
        if any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes.values()) and model.device.type == "cuda":
            torch.cuda.empty_cache()  # memory of the FP32 weights: of another size, so of no use


@contextmanager
def _computing_on(model: nn.Module, device: torch.device, what: str, remedy: str, workspace: int) -> Iterator[None]:
    """Have `model` on `device` inside, or else, with a warning, on the CPU with all its cores."""
    home, threads = model.device, torch.get_num_threads()
    try:
        if home.type != device.type and (needed := workspace + _bytes(model)) <= (free := _free_bytes(device)):
            model.to(device)
        elif home.type != device.type:
            if first_process_loads() or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":  # no other process computes
                torch.set_num_threads(_cores())
            logger.warning(
                "%s runs on the CPU, on %d cores, and may take long: it needs %.1f GiB in FP32, and %s has %.1f "
                "GiB free. Take a device with more memory; raise --ddp_timeout, for which other processes wait; or "
                "%s",
                what, torch.get_num_threads(), needed / 2**30, device, free / 2**30, remedy,
            )  # fmt: skip
        yield
    finally:
        model.to(home)
        torch.set_num_threads(threads)
        if home.type != device.type:
            torch.cuda.empty_cache()  # for what allocates beside torch, such as NCCL


def _bytes(model: nn.Module) -> int:
    """Parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _free_bytes(device: torch.device) -> int:
    """Of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.accelerator.get_memory_info(device)[0]


def _cores() -> int:
    """Those that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
