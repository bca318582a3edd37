"""Merging a low-rank adapter into a weight on the GPU, bit-equal to `low_rank.py`; in MX formats with the rounding.

A program takes a tile of some rows and columns. It reads W once, the tile's rows of B and columns of A from the cache,
and writes what the product is computed with once: between the merge and the rounding nothing goes through memory. A
product of FP32 tiles under "ieee" precision is a chain of fused multiply-adds in the order of the ranks, the
specification's own.
"""

from __future__ import annotations

import math

import torch

from ..formats import Format
from ..mx import BLOCK, FORMATS
from .triton_device import (
    _find_scale,
    _jit,
    _round,
    _scale_value,
    _to_fp32,
    _to_scaled_units,
    _to_view,
    tl,
    triton,
)
from .triton_kernels import _DTYPES, _rule, check_dtype, check_tensor, is_available, triton_dtype
from .triton_launch import interpreting, launch

SERVES = tuple(FORMATS)
# Rows, columns and warps of a program, the fastest of some dozens on an H100: for ranks that come in sixteens, whose
# rows of A and columns of B pass through shared memory, and for others.
_TILES = {16: (64, 64, 4), 1: (4, 256, 1)}

__all__ = ["SERVES", "fake_quantize_merged", "is_available", "merge"]


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A in the dtype of W; same arguments and bits as `low_rank.merge`."""
    options = {"ROUNDS": False, "EMAX": 0, "EMIN": 0, "MANTISSA_BITS": 0, "MAX_NORMAL": 0.0, "THRESHOLD": 0}
    return _merge(weight, a, b, scaling, weight.dtype, {**options, "SEARCH": False})


def fake_quantize_merged(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    fmt: Format,
    rule: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`fake_quantize(merge(weight, a, b, scaling), fmt, rule, dtype)` of the MX formats, bit for bit.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    check_dtype(dtype)
    if not fmt.fits(weight.shape[-1]):
        raise ValueError(f"the weight has shape {tuple(weight.shape)}; {fmt.name} cuts rows into blocks of {fmt.block}")
    return _merge(weight, a, b, scaling, dtype, {"ROUNDS": True, **_rule(fmt.element, rule)})


def _merge(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype, options: dict
) -> torch.Tensor:
    check_tensor(weight, _DTYPES)
    for factor in (a, b):
        check_tensor(factor, (torch.float32,))
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    *stack, rows, columns = weight.shape
    if not weight.numel():
        return out
    rank = a.shape[-2]
    at_once = 16 if rank % 16 == 0 else 1
    tile_rows, tile_columns, warps = _TILES[at_once]
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows), math.prod(stack))
    options |= {"STORED": triton_dtype(weight.dtype), "VIEW": triton_dtype(dtype)}
    options["RANK"] = rank if interpreting() else None
    launch(
        merge_kernel, grid, (weight, a, b, out), rows, columns, rank, float(scaling), ROWS=tile_rows,
        COLUMNS=tile_columns, RANKS=at_once, BLOCK=BLOCK, num_warps=warps, **options,
    )  # fmt: skip
    return out


@_jit
def merge_kernel(
    weight_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    columns,
    rank,
    scaling,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    EMAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_NORMAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,
    RANK: tl.constexpr,
    STORED: tl.constexpr,
    VIEW: tl.constexpr,
):
    ks = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ns = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    one = tl.program_id(2).to(tl.int64)  # of a stack of weights
    exists = (ns < rows)[:, None] & (ks < columns)[None, :]
    offsets = (one * rows + ns[:, None]) * columns + ks[None, :]
    a_row = a_ptr + one * rank * columns + ks
    b_column = b_ptr + (one * rows + ns) * rank
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    # RANK is None on a GPU. An argument of the interpreter is an array [1], which range() refuses from NumPy 2.4 on.
    if RANKS == 1:
        for r in range(rank if RANK is None else RANK):
            a = tl.load(a_row + r * columns, mask=ks < columns, other=0.0)
            b = tl.load(b_column + r, mask=ns < rows, other=0.0)
            b_tile, a_tile = tl.broadcast_to(b[:, None], (ROWS, COLUMNS)), tl.broadcast_to(a[None, :], (ROWS, COLUMNS))
            product = tl.fma(b_tile, a_tile, product)
    else:
        some = tl.arange(0, RANKS)
        for r in range(0, rank if RANK is None else RANK, RANKS):
            a = tl.load(a_row[None, :] + (r + some[:, None]) * columns, mask=(ks < columns)[None, :], other=0.0)
            b = tl.load(b_column[:, None] + r + some[None, :], mask=(ns < rows)[:, None], other=0.0)
            product = tl.dot(b, a, product, input_precision="ieee")
    weight = _to_fp32(tl.load(weight_ptr + offsets, mask=exists, other=0))
    merged = weight + scaling * product
    if ROUNDS:
        blocks: tl.constexpr = ROWS * COLUMNS // BLOCK
        x = tl.reshape(_to_fp32(_to_view(_to_fp32(_to_view(merged, STORED)), VIEW)), (blocks, BLOCK))
        code = _find_scale(x, blocks, EMAX, EMIN, MANTISSA_BITS, MAX_NORMAL, THRESHOLD, SEARCH)
        elements = _round(x * _to_scaled_units(code)[:, None], EMIN, MANTISSA_BITS, MAX_NORMAL)
        merged = tl.reshape(elements * _scale_value(code)[:, None], (ROWS, COLUMNS))
    tl.store(out_ptr + offsets, _to_view(merged, VIEW), mask=exists)
