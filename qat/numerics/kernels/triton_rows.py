"""E4M3 rows on the GPU, bit-equal to `e4m3_rows.py`, and the products of rows that E4M3 does not hold.

One program takes a row. It finds its largest magnitude, which decides the row's scale, rounds it, and writes E4M3
values and, where they are asked for, MXFP4 codes and block scales. Rows that are too long for its registers are read
again, from the cache.

A lost row is repaired after the product. One program takes some rows of one operand and looks for lost rows of the
other; it rounds these from their source, and multiplies in BF16, as the product without FP8 does. Where no row is lost
it ends at once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..e4m3_rows import LARGEST_EXPONENT, LARGEST_GAP, SMALLEST_FIELD, Rows
from ..formats import E4M3, Format
from ..mx import FORMATS
from .triton_device import (
    _bits,
    _find_scale,
    _float,
    _jit,
    _round,
    _scale_value,
    _seen,
    _store_codes,
    _to_fp32,
    _to_scaled_units,
    _to_view,
    tl,
    triton,
)
from .triton_kernels import _rule, check_tensor, is_available, prepare, triton_dtype
from .triton_launch import interpreting, launch

_TILE, _DEPTH = 64, 64  # rows and depth of the tiles of a repaired product
_WORDS = {4: torch.int32}  # packed codes are written as words
_FLAGS, _COUNTED = 4096, 512  # rows of which a program sees at once whether they are lost, and among which it counts
__all__ = ["is_available", "repair", "to_rows"]


def to_rows(
    x: torch.Tensor,
    fmt: Format,
    rule: str,
    dtype: torch.dtype,
    with_codes: bool,
    count: torch.Tensor,
    hadamard: bool = False,
) -> list[torch.Tensor]:
    """`e4m3_rows.from_mx` of x [..., K] seen in `dtype`; if `with_codes`, then its codes and scales in the shape of x.

    Args:
        count: int64 [1], to which the number of lost rows is added.
        hadamard: convert `hadamard.transform(x, dtype)`, which is computed in registers.
    """
    x, dtype = prepare(x, fmt, dtype)
    columns = x.shape[-1]
    rows = x.numel() // columns
    values = x.new_empty((rows, columns), dtype=E4M3.storage)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    lost = x.new_empty(rows, dtype=torch.uint8)
    given = [values, scale, lost]
    if with_codes:
        given.append(x.new_empty(fmt.code_shape(x.shape), dtype=torch.uint8))
        given.append(x.new_empty(fmt.scale_shape(x.shape), dtype=torch.uint8))
    if rows:
        codes = given[3:] or (lost, lost)  # not written
        views = _WORDS if with_codes else {}
        tile = _tile(columns, with_codes, hadamard, x.dtype == torch.float32)
        options = _options_of_rows(fmt.name, rule, dtype, columns, hadamard, *tile)
        launch(rows_kernel, (rows,), (x, *given[:3], *codes, count), columns, views=views, CODES=with_codes, **options)
    return given


def _tile(columns: int, with_codes: bool, hadamard: bool, is_fp32: bool) -> tuple[int, int]:
    """Values of a row at a time, at most, and of them for each warp: the fastest that were tried on an H100.

    benchmarks/results/rows_h100.csv has them: six for BF16 inputs, three for FP32 weights.
    """
    if columns <= 8192:
        return 8192, 1024
    if (hadamard or is_fp32) and columns <= 16384:  # no second transform, and no second read of FP32
        return 16384, 1024 if with_codes or is_fp32 else 512
    return (4096, 512) if with_codes and not hadamard else (8192, 1024)


@functools.cache
def _options_of_rows(
    fmt: str, rule: str, dtype: torch.dtype, columns: int, hadamard: bool, most: int, per_warp: int
) -> dict[str, Any]:
    """Constants of the kernel; callers do not change them."""
    of_rule, at_a_time = _rule(FORMATS[fmt].element, rule), min(triton.next_power_of_2(columns), most)
    return {
        "COLUMNS": at_a_time, "TILES": triton.cdiv(columns, at_a_time), "THRESHOLD": of_rule["THRESHOLD"],
        "SEARCH": of_rule["SEARCH"], "VIEW": triton_dtype(dtype), "HADAMARD": hadamard,
        "num_warps": max(1, at_a_time // per_warp),
    }  # fmt: skip


def repair(out: torch.Tensor, x: Rows, weight: Rows, bias: torch.Tensor | None) -> None:
    """Compute again in `out` [R, N] what lost rows of x [R, K] or of the weight [N, K] gave, in place."""
    if x.lost is None and weight.lost is None:
        return
    check_tensor(out, (torch.bfloat16,))
    (rows, columns), depth = out.shape, x.values.shape[1]
    programs = -(-columns // _TILE) - (-rows // _TILE)
    launch(
        repair_kernel, (programs,), (*_given(x), *_given(weight), out if bias is None else bias, out), rows, columns,
        depth, BIAS=bias is not None, VIEW=triton_dtype(out.dtype),
        ALL=(rows, columns, depth) if interpreting() else None,
        **_options_of_repair(_kind(x), _kind(weight)),
    )  # fmt: skip


def _given(rows: Rows) -> tuple[torch.Tensor, ...]:
    """What the kernel takes of an operand: source, values, scale, lost rows."""
    if rows.lost is None:
        return rows.values, rows.values, rows.scale, rows.values
    return rows.source.contiguous(), rows.values, rows.scale, rows.lost


def _kind(rows: Rows) -> tuple[str, str, bool, bool]:
    """Of an operand: format, rule, whether every row holds its values, and whether they are transformed."""
    return rows.fmt, rows.rule, rows.lost is None, rows.hadamard


@functools.cache
def _options_of_repair(x: tuple[str, str, bool, bool], weight: tuple[str, str, bool, bool]) -> dict[str, Any]:
    """Constants of the kernel; callers do not change them."""
    options: dict[str, Any] = {"TILE": _TILE, "DEPTH": _DEPTH, "FLAGS": _FLAGS, "COUNTED": _COUNTED, "num_warps": 4}
    for name, (fmt, rule, holds, hadamard) in (("X", x), ("W", weight)):
        of_rule = {"THRESHOLD": 0, "SEARCH": False} if holds else _rule(FORMATS[fmt].element, rule)
        options |= {f"{name}_IS_MX": not holds, f"{name}_THRESHOLD": of_rule["THRESHOLD"]}
        options |= {f"{name}_SEARCH": of_rule["SEARCH"], f"{name}_HADAMARD": hadamard and not holds}
    return options | {"IS_INTERPRETED": interpreting()}


@_jit
def _rounded(x, BLOCKS: tl.constexpr, THRESHOLD: tl.constexpr, SEARCH: tl.constexpr):
    """Biased exponents and E2M1 elements of blocks [BLOCKS, 32], seen in the right dtype already."""
    code = _find_scale(x, BLOCKS, 2, 0, 1, 6.0, THRESHOLD, SEARCH)
    elements = _round(x * _to_scaled_units(code)[:, None], 0, 1, 6.0)
    return code, elements


@_jit
def rows_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    lost_ptr,
    packed_ptr,
    block_scale_ptr,
    count_ptr,
    columns,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    CODES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,
    VIEW: tl.constexpr,
    HADAMARD: tl.constexpr,
    TOP: tl.constexpr = LARGEST_EXPONENT,
    SMALLEST: tl.constexpr = SMALLEST_FIELD,
    GAP: tl.constexpr = LARGEST_GAP,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    values_ptr += row * columns
    blocks: tl.constexpr = COLUMNS // 32
    of_block = tl.arange(0, blocks)
    offsets = of_block[:, None] * 32 + tl.arange(0, 32)[None, :]
    largest = tl.zeros((blocks, 32), tl.int32)
    for tile in tl.static_range(TILES):
        at = tile * COLUMNS + offsets
        x = _to_fp32(tl.load(x_ptr + at, mask=at < columns, other=0))
        if HADAMARD:
            x = _seen(x, blocks, x_ptr.dtype.element_ty, VIEW, True)
        largest = tl.maximum(largest, _bits(x) & 0x7FFFFFFF)
    top = tl.max(tl.max(largest, axis=1), axis=0)
    top = _bits(_to_fp32(_to_view(_float(top), VIEW))) >> 23  # rounding keeps the order
    field = tl.minimum(tl.maximum(top, SMALLEST), 254)
    to_top = _float((254 + TOP - field) << 23)
    lost = tl.zeros((blocks,), tl.int32)
    for tile in tl.static_range(TILES):
        first = tile * COLUMNS
        exists = first + offsets < columns
        if TILES > 1:
            x = _to_fp32(tl.load(x_ptr + first + offsets, mask=exists, other=0))
        if TILES > 1 or not HADAMARD:
            x = _seen(x, blocks, x_ptr.dtype.element_ty, VIEW, HADAMARD)
        code, elements = _rounded(x, blocks, THRESHOLD, SEARCH)
        holds_some = tl.max(_bits(elements) & 0x7FFFFFFF, axis=1) > 0
        lost |= ((field - code > GAP) & holds_some).to(tl.int32)
        values = elements * _scale_value(code)[:, None] * to_top
        e4m3 = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(values_ptr + first + offsets, e4m3, mask=exists)
        if CODES:
            # An element's exponent and mantissa, moved from where FP32 has them; 2^-126 makes up for the biases.
            magnitude = _float(_bits(elements) & 0x7FFFFFFF) * 1.1754943508222875e-38
            codes = (_bits(magnitude) >> 22) | ((_bits(elements) >> 31) & 8)
            own, is_there = (row * columns + first) // 32 + of_block, first + of_block * 32 < columns
            tl.store(block_scale_ptr + own, code.to(tl.uint8), mask=is_there)
            _store_codes(packed_ptr, codes, code, own, is_there, blocks, 4)
    is_lost = tl.maximum(tl.max(lost, axis=0), (top > 254).to(tl.int32))
    tl.store(scale_ptr + row, _float((field - TOP) << 23))
    tl.store(lost_ptr + row, is_lost.to(tl.uint8))
    if is_lost > 0:
        tl.atomic_add(count_ptr, 1)


@_jit
def _from_source(
    source_ptr, offsets, exists, TILE: tl.constexpr, DEPTH: tl.constexpr, THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr, HADAMARD: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Values [TILE, DEPTH] rounded from a source."""
    blocks: tl.constexpr = TILE * DEPTH // 32
    x = tl.reshape(_to_fp32(tl.load(source_ptr + offsets, mask=exists, other=0)), (blocks, 32))
    x = _seen(x, blocks, source_ptr.dtype.element_ty, VIEW, HADAMARD)
    code, elements = _rounded(x, blocks, THRESHOLD, SEARCH)
    return tl.reshape(elements * _scale_value(code)[:, None], (TILE, DEPTH))


@_jit
def _count(lost_ptr, end, END: tl.constexpr, FLAGS: tl.constexpr):
    """How many rows are lost."""
    found = tl.zeros((FLAGS,), tl.int32)
    for first in range(0, end if END is None else END, FLAGS):
        ones = first + tl.arange(0, FLAGS)
        found += tl.load(lost_ptr + ones, mask=ones < end, other=0).to(tl.int32)
    return tl.sum(found, axis=0)


@_jit
def _find(lost_ptr, end, numbers, TILE: tl.constexpr, END: tl.constexpr, COUNTED: tl.constexpr):
    """The lost rows with these numbers [TILE], counted from 0; `end` where there are no more."""
    rows = tl.zeros((TILE,), tl.int32)
    before = tl.full((), 0, tl.int32)
    for first in range(0, end if END is None else END, COUNTED):
        ones = first + tl.arange(0, COUNTED)
        lost = tl.load(lost_ptr + ones, mask=ones < end, other=0).to(tl.int32)
        up_to = before + tl.cumsum(lost, axis=0)
        is_before = (up_to[None, :] <= numbers[:, None]) & (ones < end)[None, :]
        rows += tl.sum(is_before.to(tl.int32), axis=1)
        before += tl.sum(lost, axis=0)
    return rows


@_jit
def _repair(
    own_ptr, own_values_ptr, own_scale_ptr, own_lost_ptr, lost_source_ptr, lost_ptr, bias_ptr, out_ptr, own,
    own_end, lost_end, depth, own_stride, lost_stride, OWN_IS_MX: tl.constexpr, OWN_IS_FIRST: tl.constexpr,
    OWN_THRESHOLD: tl.constexpr, OWN_SEARCH: tl.constexpr, OWN_HADAMARD: tl.constexpr, THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr, HADAMARD: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    FLAGS: tl.constexpr, COUNTED: tl.constexpr, VIEW: tl.constexpr, IS_INTERPRETED: tl.constexpr,
    LOST_END: tl.constexpr, ALL_DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows `own` of one operand times the lost rows of the other.

    Where own rows are lost too, one of the two directions has the last word: that in which own rows are of x.
    """
    has = own < own_end
    own_lost = tl.full((TILE,), 0, tl.int32)
    if OWN_IS_MX:
        own_lost = tl.load(own_lost_ptr + own, mask=has, other=0).to(tl.int32)
    is_exact = tl.max(own_lost, axis=0) == 0
    scale = tl.load(own_scale_ptr + own, mask=has, other=0)
    # LOST_END and ALL_DEPTH are None on a GPU. Arguments of the interpreter are arrays [1], which range() refuses.
    found = _count(lost_ptr, lost_end, LOST_END, FLAGS)
    tile = tl.full((), 0, tl.int32)
    while tile * TILE < found:
        rows = _find(lost_ptr, lost_end, tile * TILE + tl.arange(0, TILE), TILE, LOST_END, COUNTED)
        tile += 1
        is_lost = rows < lost_end
        product = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, depth if ALL_DEPTH is None else ALL_DEPTH, DEPTH):
            ks = first + tl.arange(0, DEPTH)
            offsets, exists = rows.to(tl.int64)[:, None] * depth + ks[None, :], is_lost[:, None] & (ks < depth)[None, :]
            a = _from_source(lost_source_ptr, offsets, exists, TILE, DEPTH, THRESHOLD, SEARCH, HADAMARD, VIEW)
            offsets, exists = own.to(tl.int64)[:, None] * depth + ks[None, :], has[:, None] & (ks < depth)[None, :]
            if is_exact:
                b = tl.load(own_values_ptr + offsets, mask=exists, other=0)
                b = b.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            else:
                b = _from_source(own_ptr, offsets, exists, TILE, DEPTH, OWN_THRESHOLD, OWN_SEARCH, OWN_HADAMARD, VIEW)
            if not IS_INTERPRETED:
                a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
            product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
        if is_exact:
            product *= scale[None, :]
        if BIAS:
            if OWN_IS_FIRST:
                product += _to_fp32(tl.load(bias_ptr + rows, mask=is_lost, other=0))[:, None]
            else:
                product += _to_fp32(tl.load(bias_ptr + own, mask=has, other=0))[None, :]
        at = rows.to(tl.int64)[:, None] * lost_stride + own.to(tl.int64)[None, :] * own_stride
        exists = is_lost[:, None] & has[None, :]
        if not OWN_IS_FIRST:
            exists &= (own_lost == 0)[None, :]
        tl.store(out_ptr + at, _to_view(product, VIEW), mask=exists)


@_jit
def repair_kernel(
    x_ptr,
    x_values_ptr,
    x_scale_ptr,
    x_lost_ptr,
    w_ptr,
    w_values_ptr,
    w_scale_ptr,
    w_lost_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    X_IS_MX: tl.constexpr,
    X_THRESHOLD: tl.constexpr,
    X_SEARCH: tl.constexpr,
    X_HADAMARD: tl.constexpr,
    W_IS_MX: tl.constexpr,
    W_THRESHOLD: tl.constexpr,
    W_SEARCH: tl.constexpr,
    W_HADAMARD: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    FLAGS: tl.constexpr,
    COUNTED: tl.constexpr,
    VIEW: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    ALL: tl.constexpr,
):
    """The first programs take rows of the weight and look for lost rows of x, the others the reverse."""
    pid = tl.program_id(0)
    of_weight = tl.cdiv(columns, TILE)
    if pid < of_weight:
        if X_IS_MX:
            own = pid * TILE + tl.arange(0, TILE)
            _repair(
                w_ptr, w_values_ptr, w_scale_ptr, w_lost_ptr, x_ptr, x_lost_ptr, bias_ptr, out_ptr, own, columns, rows,
                depth, 1, columns, W_IS_MX, False, W_THRESHOLD, W_SEARCH, W_HADAMARD, X_THRESHOLD, X_SEARCH,
                X_HADAMARD, BIAS, TILE, DEPTH, FLAGS, COUNTED, VIEW, IS_INTERPRETED,
                None if ALL is None else ALL[0], None if ALL is None else ALL[2],
            )  # fmt: skip
    elif W_IS_MX:
        own = (pid - of_weight) * TILE + tl.arange(0, TILE)
        _repair(
            x_ptr, x_values_ptr, x_scale_ptr, x_lost_ptr, w_ptr, w_lost_ptr, bias_ptr, out_ptr, own, rows, columns,
            depth, columns, 1, X_IS_MX, True, X_THRESHOLD, X_SEARCH, X_HADAMARD, W_THRESHOLD, W_SEARCH,
            W_HADAMARD, BIAS, TILE, DEPTH, FLAGS, COUNTED, VIEW, IS_INTERPRETED,
            None if ALL is None else ALL[1], None if ALL is None else ALL[2],
        )  # fmt: skip
