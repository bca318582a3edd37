"""Smooth a model with its training data: a few samples give the maximum of each activation channel."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from qat.transforms.smoothing import smooth

from ..backends.weightless import first_process_loads
from .samples import computing_in_fp32, first_samples, weights_in_fp32


def smooth_with_data(model: nn.Module, data_module: dict, alpha: float | str, device: torch.device) -> None:
    """Run `qat.transforms.smoothing.smooth` on the beginnings of the first training samples, without padding.

    What cannot be smoothed is logged, and no model ends the run.

    Weights in BF16 are smoothed in FP32 and rounded once: BF16 alone would move the logits, and nothing be smoothed.

    Every process does the same, with the strengths of "auto" that the first one chose. Under FSDP with
    `cpu_ram_efficient_loading` only the first one has weights; the others are given its smoothed ones when the model is
    sharded.

    Args:
        model: prepared by `prepare_qat`.
        data_module: from `make_supervised_data_module`.
        alpha: migration strength (SmoothQuant): how much of the outliers moves from activations into weights;
            above 0 and at most 1; or "auto", one for each activation; 0.7 where quantized experts read.
        device: where the model computes, see `samples.computing_in_fp32`.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with weights_in_fp32(model), computing_in_fp32(model, device, "smoothing", "leave it off with --smooth_alpha 0"):
        smooth(model, first_samples(data_module, model.device), alpha, _of_first_process)


def _of_first_process(strengths: list[float]) -> list[float]:
    """Those that the first process chose. Of two that are almost equal another device, or the CPU, may choose the other
    one, and under FSDP2 each process would shard weights of its own."""
    shared = [strengths]
    if PartialState().num_processes > 1 and not first_process_loads():  # else the others are not here
        broadcast_object_list(shared)
    return shared[0]
