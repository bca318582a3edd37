"""The INT4 formats on the CPU: see `cpu_int4.hpp`."""

from __future__ import annotations

import ctypes

import torch

from ..formats import Format, Quantized
from ..integer import FORMATS
from .cpu_library import check_dtype, check_tensor, empty, function, is_available, prepare

SERVES = tuple(FORMATS)

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Same arguments and bits as `integer.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = empty(x.shape, dtype)
    run = function("int4_fake_quantize", (x.dtype, dtype), 2, ctypes.c_int64, *[ctypes.c_int] * 3)
    if blocks := _blocks(x, fmt):
        run(x.data_ptr(), out.data_ptr(), blocks, fmt.block, rule == "search", torch.get_num_threads())
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and scales; same arguments and bytes as `integer.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    codes, scale = empty(fmt.code_shape(x.shape), torch.uint8), empty(fmt.scale_shape(x.shape), torch.bfloat16)
    run = function("int4_quantize", (x.dtype, dtype), 3, ctypes.c_int64, *[ctypes.c_int] * 3)
    if blocks := _blocks(x, fmt):
        pointers = x.data_ptr(), codes.data_ptr(), scale.data_ptr()
        run(*pointers, blocks, fmt.block, rule == "search", torch.get_num_threads())
    return Quantized(codes, (scale,))


def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `integer.quantize_to_scale`."""
    x, dtype = prepare(x, fmt, dtype)
    fmt.check_scales(x.shape, scale)
    scale = scale.contiguous()
    codes = empty(fmt.code_shape(x.shape), torch.uint8)
    run = function("int4_quantize_to_scale", (x.dtype, dtype), 3, ctypes.c_int64, *[ctypes.c_int] * 2)
    if blocks := _blocks(x, fmt):
        run(x.data_ptr(), scale.data_ptr(), codes.data_ptr(), blocks, fmt.block, torch.get_num_threads())
    return codes


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `integer.dequantize`."""
    codes, (scale,) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(shape, scale)
    check_dtype(dtype)
    codes, scale = codes.contiguous(), scale.contiguous()
    out = empty(shape, dtype)
    run = function("int4_dequantize", (dtype,), 3, ctypes.c_int64, *[ctypes.c_int] * 2)
    if blocks := scale.numel():
        run(codes.data_ptr(), scale.data_ptr(), out.data_ptr(), blocks, fmt.block, torch.get_num_threads())
    return out


def _blocks(x: torch.Tensor, fmt: Format) -> int:
    assert fmt.block is not None, fmt.name
    return x.numel() // fmt.block
