"""Products with a Hadamard matrix on the GPU, bit-equal to `../hadamard.py`: a program takes a tile of blocks."""

from __future__ import annotations

import torch

from ..hadamard import ROOT, SIZE, check_shape
from .triton_device import _jit, _offsets, _tile, _to_fp32, _to_view, tl, triton
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
            VIEW=triton_dtype(dtype), ROOT=ROOT, num_warps=_WARPS,
        )  # fmt: skip
    return out


@_jit
def _stage(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, DISTANCE: tl.constexpr):
    """Sums and differences of values of x [ROWS, 32] that are DISTANCE apart, in their places."""
    pairs = tl.permute(tl.reshape(x, (ROWS, GROUPS, 2, DISTANCE)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (ROWS, GROUPS * 2 * DISTANCE))


@_jit
def transform_kernel(
    x_ptr,
    out_ptr,
    blocks,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    VIEW: tl.constexpr,
    ROOT: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets, exists = _offsets(rows, SIZE), exists[:, None]
    x = _to_fp32(tl.load(x_ptr + offsets, mask=exists, other=0))
    if x_ptr.dtype.element_ty != VIEW:
        x = _to_fp32(_to_view(x, VIEW))
    x = _stage(x, ROWS, 1, 16)
    x = _stage(x, ROWS, 2, 8)
    x = _stage(x, ROWS, 4, 4)
    x = _stage(x, ROWS, 8, 2)
    x = _stage(x, ROWS, 16, 1)
    tl.store(out_ptr + offsets, _to_view(tl.div_rn(x, ROOT), VIEW), mask=exists)
