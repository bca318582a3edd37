"""What changes weights before training: smoothing, and GPTQ on a few training samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from qat.compensation.gptq import compensate
from qat.compensation.moments import MEMORY, linear_sites
from qat.errors import UserError
from qat.numerics.formats import E8M0
from qat.schemes.config import QATConfig

from ..arguments.quantization import QuantizationArguments
from .samples import WORKSPACE, computing_in_fp32, first_samples, weights_in_fp32
from .smoothing import smooth_with_data


def change_of_weights(
    model: nn.Module,
    data: dict,
    training_data: dict,
    settings: QuantizationArguments,
    device: torch.device,
    rounds: bool = False,
) -> Callable[[], None] | None:
    """What changes the weights of a prepared model in place as the settings say; None where they ask for nothing.

    Args:
        data: from `make_supervised_data_module`.
        training_data: the same with the text that is mixed into training.
        device: where the model computes.
        rounds: whether nothing is going to be trained, see `compensate`.
    """
    if not settings.smooth_alpha and settings.weight_init == "none":
        return None

    def change() -> None:
        if settings.smooth_alpha:
            smooth_with_data(model, data, settings.smooth_alpha, device)
        if settings.weight_init != "none":
            compensate_with_data(model, training_data, settings.weight_init_samples, device, rounds)

    return change


def compensate_with_data(
    model: nn.Module, data_module: dict, samples: int, device: torch.device, rounds: bool = False
) -> None:
    """Run `qat.compensation.gptq.compensate` on the beginnings of the first training samples, without padding.

    Every process does the same with the same samples. Under FSDP with `cpu_ram_efficient_loading` only the first one
    has weights; the others are given its own when the model is sharded. Elsewhere the rows of a weight do not depend on
    each other, so that shards of several processes fit together.

    Args:
        model: prepared by `prepare_qat`, and smoothed if it is going to be.
        data_module: from `make_supervised_data_module`, with the text that is mixed into training.
        samples: how many, at most.
        device: where the model computes, see `samples.computing_in_fp32`.
        rounds: see `compensate`.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    remedy = "leave it off with --weight_init none"
    try:
        with weights_in_fp32(model), computing_in_fp32(model, device, "GPTQ", remedy, _workspace(model)):
            compensate(model, first_samples(data_module, model.device, samples), rounds=rounds)
        if rounds and any(site.module.weight_quantizer.spec.format.scale is E8M0 for site in linear_sites(model)):
            config = cast(QATConfig, model.qat_config)
            model.qat_config = dataclasses.replace(config, rounded=True)  # type: ignore[assignment]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--weight_init gptq: {device} has too little memory for the model in FP32 and up to "
            f"{_workspace(model) / 2**30:.0f} GiB beside it ({str(error).splitlines()[0]}); take a device with more "
            f"memory, or {remedy}"
        ) from None


def _workspace(model: nn.Module) -> int:
    """Bytes beside the weights: the moments of a lot, three more matrices of the widest input, and a forward pass."""
    widest = max((site.shape[1] for site in linear_sites(model)), default=0)
    return WORKSPACE + MEMORY + 3 * 4 * widest**2
