"""The FP8 formats on the CPU: a scale for a row, or for a block, which is a row here; see `cpu_kernels.cpp`."""

from __future__ import annotations

import ctypes

import torch

from ..formats import BF16, Format, Quantized
from ..fp8 import FORMATS, SMALLEST_INPUT_SCALE, SMALLEST_WEIGHT_SCALE
from .cpu_library import check_dtype, check_tensor, empty, function, is_available, prepare

SERVES = tuple(FORMATS)

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize"]


class _RowScale(ctypes.Structure):
    """`RowScale` in cpu_kernels.cpp."""

    _fields_ = [("bf16_scale", ctypes.c_int32), ("native", ctypes.c_int32), ("smallest", ctypes.c_float)]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Same arguments and bits as `fp8.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = empty(x.shape, dtype)
    _run("fp8_fake_quantize", x, (out,), fmt.block or x.shape[-1], _row_scale(fmt, rule, dtype), x.dtype, dtype)
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and scales; same arguments and bytes as `fp8.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    codes = empty(x.shape, torch.uint8)
    scale = empty(fmt.scale_shape(x.shape), torch.float32)
    _run("fp8_quantize", x, (codes, scale), fmt.block or x.shape[-1], _row_scale(fmt, rule, dtype), x.dtype, dtype)
    return Quantized(codes, (scale.to(fmt.scale.storage),))  # exact: the kernel has rounded it


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `fp8.dequantize`."""
    codes, (scale,) = quantized.codes, quantized.scales
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(codes.shape, scale)
    check_dtype(dtype)
    codes, scale = codes.contiguous(), scale.float().contiguous()
    out = empty(codes.shape, dtype)
    _run("fp8_dequantize", codes, (scale, out), fmt.block or codes.shape[-1], None, dtype)
    return out


def _run(
    verb: str,
    first: torch.Tensor,
    others: tuple[torch.Tensor, ...],
    columns: int,
    row_scale: _RowScale | None,
    *dtypes: torch.dtype,
) -> None:
    rest = [ctypes.c_int64, ctypes.c_int64] + ([] if row_scale is None else [ctypes.POINTER(_RowScale)])
    run = function(verb, dtypes, 1 + len(others), *rest, ctypes.c_int)
    if first.numel():
        pointers = (tensor.data_ptr() for tensor in (first, *others))
        settings = () if row_scale is None else (row_scale,)
        run(*pointers, first.numel() // columns, columns, *settings, torch.get_num_threads())


def _row_scale(fmt: Format, rule: str, dtype: torch.dtype) -> _RowScale:
    if rule == "absmax_native":
        return _RowScale(0, 1, float(torch.finfo(dtype).eps))
    is_weight = fmt.scale == BF16
    return _RowScale(int(is_weight), 0, SMALLEST_WEIGHT_SCALE if is_weight else SMALLEST_INPUT_SCALE)
