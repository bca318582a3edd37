"""Merging a low-rank adapter into a weight on the CPU: see `cpu_merge.hpp`."""

from __future__ import annotations

import ctypes
import math

import torch

from .cpu_library import NAMES, check_tensor, empty, function, is_available

__all__ = ["is_available", "merge"]


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A in the dtype of W; same arguments and bits as `low_rank.merge`.

    Raises:
        ValueError: a dtype or device that the kernel cannot take.
    """
    check_tensor(weight, tuple(NAMES))
    for factor in (a, b):
        check_tensor(factor, (torch.float32,))
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    out = empty(weight.shape, weight.dtype)
    *stack, rows, columns = weight.shape
    run = function("low_rank_merge", (weight.dtype,), 4, *[ctypes.c_int64] * 4, ctypes.c_float, ctypes.c_int)
    if weight.numel():
        pointers = weight.data_ptr(), a.data_ptr(), b.data_ptr(), out.data_ptr()
        run(*pointers, math.prod(stack), rows, columns, a.shape[-2], scaling, torch.get_num_threads())
    return out
