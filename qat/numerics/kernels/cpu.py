"""The MX formats on the CPU: see `cpu_kernels.cpp` for the kernels and `cpu_library.py` for how they are built."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from ..formats import Format, Quantized
from ..mx import BLOCK, FORMATS
from ..rules import mantissa_threshold
from .cpu_library import check_dtype, check_tensor, empty, function, is_available, prepare

SERVES = tuple(FORMATS)

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


class _Format(ctypes.Structure):
    """`MxFormat` in cpu_kernels.cpp."""

    _fields_ = [
        ("bits", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("emin", ctypes.c_int32),
        ("emax", ctypes.c_int32),
        ("max_normal", ctypes.c_float),
        ("mantissa_threshold", ctypes.c_uint32),
        ("search", ctypes.c_int32),
    ]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x's nearest values on the MX grid; same arguments and bits as `mx.fake_quantize`, contiguous.

    Args:
        x: [..., K] float32, bfloat16 or float16 on the CPU, K a multiple of 32.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = empty(x.shape, dtype)
    run = _function("mx_fake_quantize", 2, x.dtype, dtype)
    if blocks := x.numel() // BLOCK:
        run(x.data_ptr(), out.data_ptr(), blocks, _format(fmt.name, rule), torch.get_num_threads())
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and biased E8M0 scales; same arguments and bytes as `mx.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    codes, scale_e8m0_biased = empty(fmt.code_shape(x.shape), torch.uint8), empty(fmt.scale_shape(x.shape), torch.uint8)
    run = _function("mx_quantize", 3, x.dtype, dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = x.data_ptr(), codes.data_ptr(), scale_e8m0_biased.data_ptr()
        run(*pointers, blocks, _format(fmt.name, rule), torch.get_num_threads())
    return Quantized(codes, (scale_e8m0_biased,))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype` (float32, bfloat16 or float16), as `mx.dequantize`."""
    codes, (scale_e8m0_biased,) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    for tensor in quantized.tensors:
        check_tensor(tensor, (torch.uint8,))
    fmt.check_scales(shape, scale_e8m0_biased)
    check_dtype(dtype)
    codes, scale_e8m0_biased = codes.contiguous(), scale_e8m0_biased.contiguous()
    out = empty(shape, dtype)
    run = _function("mx_dequantize", 3, dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = codes.data_ptr(), scale_e8m0_biased.data_ptr(), out.data_ptr()
        run(*pointers, blocks, _format(fmt.name, "floor"), torch.get_num_threads())
    return out


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `mx.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = prepare(x, fmt, dtype)
    fmt.check_scales(x.shape, scale_e8m0_biased)
    scale_e8m0_biased = scale_e8m0_biased.contiguous()
    codes = empty(fmt.code_shape(x.shape), torch.uint8)
    run = _function("mx_quantize_to_scale", 3, x.dtype, dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = x.data_ptr(), scale_e8m0_biased.data_ptr(), codes.data_ptr()
        run(*pointers, blocks, _format(fmt.name, "floor"), torch.get_num_threads())
    return codes


def _function(verb: str, pointers: int, *dtypes: torch.dtype) -> Callable[..., None]:
    return function(verb, dtypes, pointers, ctypes.c_int64, ctypes.POINTER(_Format), ctypes.c_int)


@functools.cache
def _format(name: str, rule: str) -> _Format:
    element = FORMATS[name].element
    return _Format(
        bits=element.bits,
        mantissa_bits=element.mantissa_bits,
        emin=element.emin,
        emax=element.emax,
        max_normal=element.largest,
        mantissa_threshold=mantissa_threshold(element, rule),
        search=rule == "search",
    )
