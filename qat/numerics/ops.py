"""The MX operators: one door to quantization, whatever the device.

Registered with `torch.library`, they carry fake (meta) kernels for torch.compile and FSDP's meta tensors. Behind them
stands the fastest backend that the tensor's device has; each is bit-equal to `reference.py`.

Formats and rules travel as strings, because operator schemas know no Python objects.
"""

from __future__ import annotations

import torch

from . import mx as reference
from .formats import BLOCK_SIZE, get_format
from .kernels import cpu, triton_kernels


def _backend(x: torch.Tensor):
    """The module whose kernels serve `x`; all have reference.py's functions."""
    if x.device.type == "cpu" and cpu.is_available():
        return cpu
    if x.device.type == "cuda" and triton_kernels.is_available():
        return triton_kernels
    return reference


def has_kernels(x: torch.Tensor) -> bool:
    """Whether kernels serve `x`'s device; else it is plain PyTorch, which needs several times the memory of `x`."""
    return _backend(x) is not reference


@torch.library.custom_op("mx_qat::fake_quantize", mutates_args=())
def fake_quantize(x: torch.Tensor, fmt: str, rule: str, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K] -> its values on the MX grid, [..., K] in `dtype`: first `x.to(dtype)`, then rounding.

    The gradient passes straight through (Bengio et al., arXiv:1308.3432), in x's dtype.
    """
    return _backend(x).fake_quantize(x, get_format(fmt), rule, dtype)


@fake_quantize.register_fake
def _(x, fmt, rule, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _remember_dtype(ctx, inputs, output):
    ctx.input_dtype = inputs[0].dtype


def _straight_through(ctx, grad):
    return grad.to(ctx.input_dtype), None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_remember_dtype)


@torch.library.custom_op("mx_qat::quantize", mutates_args=())
def quantize(x: torch.Tensor, fmt: str, rule: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K], seen in `dtype` -> packed codes (uint8 [..., K * bits / 8]) and E8M0 scales (uint8 [..., K / 32])."""
    return _backend(x).quantize(x, get_format(fmt), rule, dtype)


@quantize.register_fake
def _(x, fmt, rule, dtype):
    *rows, columns = x.shape
    packed = x.new_empty((*rows, columns * get_format(fmt).bits // 8), dtype=torch.uint8)
    return packed, x.new_empty((*rows, columns // BLOCK_SIZE), dtype=torch.uint8)


@torch.library.custom_op("mx_qat::dequantize", mutates_args=())
def dequantize(packed: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `quantize`: [..., K] in `dtype`."""
    return _backend(packed).dequantize(packed, scale_e8m0_biased, get_format(fmt), dtype)


@dequantize.register_fake
def _(packed, scale_e8m0_biased, fmt, dtype):
    *rows, blocks = scale_e8m0_biased.shape
    return packed.new_empty((*rows, blocks * BLOCK_SIZE), dtype=dtype)


@torch.library.custom_op("mx_qat::quantize_to_scale", mutates_args=())
def quantize_to_scale(x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """Packed codes, as of `quantize`, of x [..., K], seen in `dtype`, under given scales (uint8 [..., K / 32])."""
    return _backend(x).quantize_to_scale(x, scale_e8m0_biased, get_format(fmt), dtype)


@quantize_to_scale.register_fake
def _(x, scale_e8m0_biased, fmt, dtype):
    *rows, columns = x.shape
    return x.new_empty((*rows, columns * get_format(fmt).bits // 8), dtype=torch.uint8)
