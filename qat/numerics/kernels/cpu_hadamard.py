"""Products with a Hadamard matrix on the CPU: see `cpu_hadamard.hpp`."""

from __future__ import annotations

import ctypes

import torch

from ..hadamard import SIZE, check_shape
from .cpu_library import FUSED_VIEWS, NAMES, check_dtype, check_tensor, empty, function, is_available

__all__ = ["is_available", "transform"]


def transform(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Same arguments and bits as `hadamard.transform`, contiguous.

    Raises:
        ValueError: an argument that blocks of 32 or this kernel cannot take.
    """
    check_shape(x)
    check_dtype(dtype)
    check_tensor(x, tuple(NAMES))
    if x.dtype != dtype and (x.dtype, dtype) not in FUSED_VIEWS:
        x = x.to(dtype)
    x = x.contiguous()
    out = empty(x.shape, dtype)
    run = function("hadamard", (x.dtype, dtype), 2, ctypes.c_int64, ctypes.c_int)
    if blocks := x.numel() // SIZE:
        run(x.data_ptr(), out.data_ptr(), blocks, torch.get_num_threads())
    return out
