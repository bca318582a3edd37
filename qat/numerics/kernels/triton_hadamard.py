"""Products with a Hadamard matrix on the GPU, bit-equal to `../hadamard.py`: a program takes a tile of blocks."""

from __future__ import annotations

import torch

from ..hadamard import SIZE, check_shape
from .triton_device import _jit, _offsets, _seen, _tile, _to_fp32, _to_view, _transformed, tl, triton
from .triton_kernels import _DTYPES, check_dtype, check_tensor, is_available, triton_dtype
from .triton_launch import launch

_ROWS, _WARPS = 32, 1  # blocks of a program; one warp exchanges values without waiting for others
__all__ = ["is_available", "transform"]


def transform(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Same arguments and bits as `hadamard.transform`, contiguous.

    Raises:
        ValueError: an argument that blocks of 32 or this kernel cannot take.
    """
    check_shape(x)
    check_dtype(dtype)
    check_tensor(x, _DTYPES)
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if blocks := x.numel() // SIZE:
        launch(
            transform_kernel, (triton.cdiv(blocks, _ROWS),), (x, out), blocks, ROWS=_ROWS, SIZE=SIZE,
            VIEW=triton_dtype(dtype), num_warps=_WARPS,
        )  # fmt: skip
    return out


@_jit
def transform_kernel(
    x_ptr,
    out_ptr,
    blocks,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    VIEW: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets, exists = _offsets(rows, SIZE), exists[:, None]
    x = _seen(_to_fp32(tl.load(x_ptr + offsets, mask=exists, other=0)), ROWS, x_ptr.dtype.element_ty, VIEW, False)
    out = _transformed(x, ROWS, VIEW)
    tl.store(out_ptr + offsets, _to_view(out, VIEW), mask=exists)
