"""Which layers compute their forward products in FP8, on GPUs that can."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import UserError
from ..numerics import ops
from ..numerics.e4m3_rows import FP8_FORMATS, MX_FORMATS
from ..numerics.kernels import triton_rows
from .quant_linear import LinearProduct

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
CAPABILITY = (8, 9)  # the first that multiplies E4M3 values
_MULTIPLE = 16  # of rows and columns of the weight, which FP8 products need


def use_fp8_matmul(model: nn.Module, mode: str, device: torch.device) -> list[str]:
    """Let linear layers of a prepared model compute their forward products in FP8, or not.

    The products are the same sums of the same values as in BF16, added up in another order. Backward products, experts
    and layers in formats whose values E4M3 does not hold stay as they are.

    Args:
        mode: "auto": where the device can; "on": the same, and an error where no layer can; "off".
        device: that the model will run on.

    Returns:
        The names of the layers.

    Raises:
        UserError: "on", and the device or the formats cannot.
    """
    layers = linear_products(model)
    reason = None if mode == "off" else why_not(device)
    chosen = [] if mode == "off" or reason else [name for name, layer in layers.items() if is_possible(layer)]
    if mode == "on" and not chosen:
        formats = ", ".join((*MX_FORMATS, *FP8_FORMATS))
        reason = reason or f"no linear layer has both its weight and its input in formats that fit ({formats})"
        raise UserError(f"--fp8_matmul on is not possible: {reason}; leave it out, or give --fp8_matmul off")
    for name, layer in layers.items():
        layer.in_fp8 = name in set(chosen)
    if chosen and device.type == "cuda":
        ops.lost_rows(device)  # made now, and not while a graph is recorded
    return chosen


def linear_products(model: nn.Module) -> dict[str, LinearProduct]:
    """The quantized linear layers of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearProduct)}


def log_fp8_matmul(model: nn.Module, chosen: list[str], mode: str, device: torch.device) -> None:
    """Say which products are in FP8, or why none are; nothing where it was not asked for or no GPU is there."""
    count = len(linear_products(model))
    if chosen:
        logger.info("Forward products of %d of %d quantized linear layers are computed in FP8", len(chosen), count)
    elif count and mode == "auto" and device.type == "cuda":
        reason = why_not(device) or "the values of these formats do not fit"
        logger.info("Forward products are computed in BF16, not in FP8: %s", reason)


def why_not(device: torch.device) -> str | None:
    """Why products in FP8 are not possible on a device; None where they are."""
    if device.type != "cuda":
        return f"the run is on {device.type.upper()}, and FP8 products need an NVIDIA GPU"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        needed, found_text = (".".join(map(str, c)) for c in (CAPABILITY, found))
        return f"the GPU has compute capability {found_text}, and FP8 products need {needed}"
    return None if triton_rows.is_available() else "Triton is not installed"


def is_possible(layer: LinearProduct) -> bool:
    """Whether E4M3 rows hold both operands of a layer, in the shapes that products in FP8 take."""
    scheme, known = layer.scheme, MX_FORMATS + FP8_FORMATS
    if not layer.weight_quantizer.rounding.gives_rows or layer.weight_quantizer.scale is not None:
        return False
    if scheme.input is None or scheme.weight.format.name not in known or scheme.input.format.name not in known:
        return False
    return all(size % _MULTIPLE == 0 for size in layer.weight_shape)
