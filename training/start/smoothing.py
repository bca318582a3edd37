"""Smooth a model with its training data: a few samples give the maximum of each activation channel."""

from __future__ import annotations

import torch
from torch import nn

from qat.transforms.smoothing import smooth
from qat.transforms.strength import AUTO, check_choosable

from .samples import computing_in_fp32, first_samples


def smooth_with_data(model: nn.Module, data_module: dict, alpha: float | str, device: torch.device) -> None:
    """Run `qat.transforms.smoothing.smooth` on the beginnings of the first training samples, without padding.

    What cannot be smoothed is logged, and no model ends the run.

    Every process does the same. Under FSDP with `cpu_ram_efficient_loading` only the first one has weights; the others
    are given its smoothed ones when the model is sharded.

    Args:
        model: prepared by `prepare_qat`.
        data_module: from `make_supervised_data_module`.
        alpha: migration strength (SmoothQuant): how much of the outliers moves from activations into weights;
            above 0 and at most 1; or "auto", one for each activation.
        device: where the model computes, see `samples.computing_in_fp32`.

    Raises:
        UserError: in every process, if alpha is "auto" and the model has quantized experts.
    """
    if alpha == AUTO:
        check_choosable(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with computing_in_fp32(model, device, "smoothing", "leave it off with --smooth_alpha 0"):
        smooth(model, first_samples(data_module, model.device), alpha)
