"""Merging a low-rank adapter into a weight on the CPU, in MX formats with the rounding: see `cpu_merge.hpp`."""

from __future__ import annotations

import ctypes
import math

import torch

from ..formats import Format
from ..mx import FORMATS
from .cpu import _Format, _format
from .cpu import fake_quantize as _fake_quantize
from .cpu_library import FUSED_VIEWS, NAMES, check_dtype, check_tensor, empty, function, is_available

SERVES = tuple(FORMATS)
_SIZES = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_float)  # stack to scaling

__all__ = ["SERVES", "fake_quantize_merged", "is_available", "merge"]


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A in the dtype of W; same arguments and bits as `low_rank.merge`.

    Raises:
        ValueError: a dtype or device that the kernel cannot take.
    """
    weight, a, b = _prepared(weight, a, b)
    out = empty(weight.shape, weight.dtype)
    run = function("low_rank_merge", (weight.dtype,), 4, *_SIZES, ctypes.c_int)
    if weight.numel():
        pointers = weight.data_ptr(), a.data_ptr(), b.data_ptr(), out.data_ptr()
        run(*pointers, *_sizes(weight, a), scaling, torch.get_num_threads())
    return out


def fake_quantize_merged(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, fmt: Format, rule: str, dtype: torch.dtype
) -> torch.Tensor:
    """`fake_quantize(merge(weight, a, b, scaling), fmt, rule, dtype)` of the MX formats, bit for bit.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    check_dtype(dtype)
    if weight.dtype != dtype and (weight.dtype, dtype) not in FUSED_VIEWS:
        return _fake_quantize(merge(weight, a, b, scaling), fmt, rule, dtype)
    if not fmt.fits(weight.shape[-1]):
        raise ValueError(f"the weight has shape {tuple(weight.shape)}; {fmt.name} cuts rows into blocks of {fmt.block}")
    weight, a, b = _prepared(weight, a, b)
    out = empty(weight.shape, dtype)
    run = function("low_rank_mx", (weight.dtype, dtype), 4, *_SIZES, ctypes.POINTER(_Format), ctypes.c_int)
    if weight.numel():
        pointers = weight.data_ptr(), a.data_ptr(), b.data_ptr(), out.data_ptr()
        run(*pointers, *_sizes(weight, a), scaling, _format(fmt.name, rule), torch.get_num_threads())
    return out


def _prepared(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All three checked and contiguous."""
    check_tensor(weight, tuple(NAMES))
    for factor in (a, b):
        check_tensor(factor, (torch.float32,))
    return weight.contiguous(), a.contiguous(), b.contiguous()


def _sizes(weight: torch.Tensor, a: torch.Tensor) -> tuple[int, int, int, int]:
    """How many weights, rows, columns, ranks."""
    *stack, rows, columns = weight.shape
    return math.prod(stack), rows, columns, a.shape[-2]
