"""The FP8 formats on the GPU. With a scale a row, one program takes a row: it holds up to 4096 values in registers and
reads longer rows twice, once for their maximum and once to round them. With a scale a block, one takes several blocks.

Bit-equal to `fp8.py`: quotients are rounded as in IEEE 754 (by `div_rn` or `_corrected`; Triton's `/` is an
approximation), products are not fused where that would change bits, and BF16 scales and quotients are rounded to
nearest even.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import BF16, Format, Quantized
from ..fp8 import FORMATS, SMALLEST_INPUT_SCALE, SMALLEST_WEIGHT_SCALE
from .triton_blocks import _corrected, _largest_bits, _magnitude
from .triton_device import (
    _bits,
    _code,
    _float,
    _jit,
    _offsets,
    _round_magnitude,
    _tile,
    _to_fp32,
    _to_view,
    tl,
    triton,
)
from .triton_kernels import check_dtype, check_tensor, is_available, prepare, triton_dtype
from .triton_launch import launch

SERVES = tuple(FORMATS)
_COLUMNS, _PER_WARP = 4096, 512  # values of a row at a time, at most, and of them for each warp: the fastest on an H100
_BLOCK_VALUES, _BLOCK_WARPS = 1024, 2  # of a program that takes blocks: the best of 1024 to 4096 and 1 to 4 warps

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize"]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Same arguments and bits as `fp8.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(_QUANTIZE, (x, out, out), x, fmt, {**_rule(fmt, rule, dtype), "TO_CODES": False})
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and scales; same arguments and bytes as `fp8.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(fmt.scale_shape(x.shape), dtype=fmt.scale.storage, device=x.device)
    _launch(_QUANTIZE, (x, codes, _as_bits(scale)), x, fmt, {**_rule(fmt, rule, dtype), "TO_CODES": True})
    return Quantized(codes, (scale,))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `fp8.dequantize`."""
    codes, (scale,) = quantized.codes, quantized.scales
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(codes.shape, scale)
    check_dtype(dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    tensors = (codes.contiguous(), _as_bits(scale.contiguous()), out)
    _launch(_DEQUANTIZE, tensors, codes, fmt, {"VIEW": triton_dtype(dtype)})
    return out


def _as_bits(scale: torch.Tensor) -> torch.Tensor:
    """BF16 scales as integers."""
    return scale.view(torch.int16) if scale.dtype == torch.bfloat16 else scale


def _rule(fmt: Format, rule: str, dtype: torch.dtype) -> dict:
    native, is_weight = rule == "absmax_native", fmt.scale == BF16
    smallest = float(torch.finfo(dtype).eps) if native else SMALLEST_WEIGHT_SCALE if is_weight else SMALLEST_INPUT_SCALE
    return {
        "NATIVE": native, "BF16_SCALE": is_weight, "SMALLEST": smallest, "VIEW": triton_dtype(dtype),
        "BF16": triton_dtype(torch.bfloat16),
    }  # fmt: skip


def _launch(
    kernels: tuple[Any, Any], tensors: tuple[torch.Tensor, ...], x: torch.Tensor, fmt: Format, options: dict
) -> None:
    """Start that of the two kernels, for rows and for blocks, which serves the format."""
    if not x.numel():
        return
    of_rows, of_blocks = kernels
    if fmt.block is not None:
        blocks, rows = x.numel() // fmt.block, _BLOCK_VALUES // fmt.block
        options |= {"ROWS": rows, "SIZE": fmt.block, "num_warps": _BLOCK_WARPS}
        return launch(of_blocks, (triton.cdiv(blocks, rows),), tensors, blocks, **options)
    columns = x.shape[-1]
    at_a_time = min(1 << (columns - 1).bit_length(), _COLUMNS)
    options |= {"COLUMNS": at_a_time, "TILES": -(-columns // at_a_time)}
    options["num_warps"] = max(1, min(at_a_time // _PER_WARP, 16))
    launch(of_rows, (x.numel() // columns,), tensors, columns, **options)


@_jit
def _fp8_code(magnitude_bits):
    """Codes (int32) of the nearest E4M3 elements of magnitudes (FP32 bits, at most 448)."""
    field = tl.maximum(magnitude_bits, (127 - 6) << 23) & 0x7F800000
    magic = field + ((20 << 23) + (1 << 22))
    steps = _bits(_float(magnitude_bits) + _float(magic)) - magic
    return steps + ((field - ((127 - 6) << 23)) >> 20)


@_jit
def _fp8_element(code):
    """Values (FP32) of E4M3 codes without their signs; the code above the largest is NaN."""
    # An exact product makes up for the biases; subnormal elements are subnormal FP32 numbers until then.
    value = _float(code << 20) * 1329227995784915872903807060280344576.0  # 2^120
    return tl.where(code > 0x7E, float("nan"), value)


@_jit
def _store_scale(scale_ptr, scale, exists):
    """Store FP32 scales, or the upper halves of those that are BF16 numbers."""
    if scale_ptr.dtype.element_ty == tl.int16:
        tl.store(scale_ptr, (_bits(scale) >> 16).to(tl.int16), mask=exists)
    else:
        tl.store(scale_ptr, scale, mask=exists)


@_jit
def _load_row(x_ptr, offsets, columns, VIEW: tl.constexpr):
    """Values (FP32) of a tile of the row at `x_ptr`, as seen in VIEW; zero beyond its end."""
    return _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + offsets, mask=offsets < columns, other=0)), VIEW))


@_jit
def _scale(
    amax,
    quotient,
    NATIVE: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    VIEW: tl.constexpr,
    BF16: tl.constexpr,
):
    """Scales from largest magnitudes (FP32 bits) and these over 448; NaN where one is not finite."""
    scale = quotient
    if NATIVE:
        scale = _to_fp32(_to_view(scale, VIEW))
        scale = tl.where(scale == 0.0, SMALLEST, scale)
    else:
        if BF16_SCALE:
            scale = _to_fp32(_to_view(scale, BF16))
        scale = tl.maximum(scale, SMALLEST)
    return tl.where(amax >= 0x7F800000, float("nan"), scale)


@_jit
def _round_over(magnitude, scale, NATIVE: tl.constexpr, VIEW: tl.constexpr, DIVIDES: tl.constexpr):
    """Elements (FP32) nearest to magnitudes over their scales (a number, or [ROWS, 1])."""
    if DIVIDES:
        scaled = tl.math.div_rn(magnitude, tl.zeros_like(magnitude) + scale)
    else:
        reciprocal = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
        scaled = _corrected(magnitude, tl.zeros_like(magnitude) + scale, tl.zeros_like(magnitude) + reciprocal)
    if NATIVE:
        scaled = _to_fp32(_to_view(scaled, VIEW))
    return _round_magnitude(tl.minimum(scaled, 448.0), 0.015625, 3)  # the smallest normal element is 2^-6


@_jit
def _is_moderate(scale):
    """Scales of which quotients may be computed by `_corrected`: those that count are 2^-11 and more."""
    return (scale >= 5.421010862427522e-20) & (scale <= 18446744073709551616.0)  # 2^-64, 2^64


@_jit
def quantize_row_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    columns,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    NATIVE: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    VIEW: tl.constexpr,
    BF16: tl.constexpr,
    TO_CODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    out_ptr += row * columns
    offsets = tl.arange(0, COLUMNS)
    x = _load_row(x_ptr, offsets, columns, VIEW)
    largest = _bits(x) & 0x7FFFFFFF  # compared as integers, NaN and infinity come out on top
    for tile in tl.static_range(1, TILES):
        more = _load_row(x_ptr, tile * COLUMNS + offsets, columns, VIEW)
        largest = tl.maximum(largest, _bits(more) & 0x7FFFFFFF)
    amax = tl.max(largest, axis=0)
    scale = _scale(amax, tl.math.div_rn(_float(amax), 448.0), NATIVE, BF16_SCALE, SMALLEST, VIEW, BF16)
    broken = amax >= 0x7F800000
    if TO_CODES:
        _store_scale(scale_ptr + row, scale, True)
    for tile in tl.static_range(TILES):
        here = tile * COLUMNS + offsets
        if TILES > 1:
            x = _load_row(x_ptr, here, columns, VIEW)
        if _is_moderate(scale):
            element = _round_over(_magnitude(x), scale, NATIVE, VIEW, False)
        else:
            element = _round_over(_magnitude(x), scale, NATIVE, VIEW, True)
        sign = _bits(x) & -0x80000000
        if TO_CODES:
            code = tl.where(broken, 0, _code(element, sign, -6, 3, 8) >> 24)
            tl.store(out_ptr + here, code.to(tl.uint8), mask=here < columns)
        else:
            value = _float(_bits(element * scale) | sign)
            tl.store(out_ptr + here, _to_view(value, VIEW), mask=here < columns)


@_jit
def quantize_block_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    blocks,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    NATIVE: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    VIEW: tl.constexpr,
    BF16: tl.constexpr,
    TO_CODES: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, SIZE)
    x = _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + offsets, mask=exists[:, None], other=0)), VIEW))
    amax = _largest_bits(x)
    quotient = tl.math.div_rn(_float(amax), tl.zeros((ROWS,), tl.float32) + 448.0)
    scale = _scale(amax, quotient, NATIVE, BF16_SCALE, SMALLEST, VIEW, BF16)
    if tl.min(_is_moderate(scale).to(tl.int32), axis=0) > 0:
        element = _round_over(_magnitude(x), scale[:, None], NATIVE, VIEW, False)
    else:
        element = _round_over(_magnitude(x), scale[:, None], NATIVE, VIEW, True)
    sign = _bits(x) & -0x80000000
    if TO_CODES:
        _store_scale(scale_ptr + rows, scale, exists)
        code = tl.where((amax >= 0x7F800000)[:, None], 0, _code(element, sign, -6, 3, 8) >> 24)
        tl.store(out_ptr + offsets, code.to(tl.uint8), mask=exists[:, None])
    else:
        value = _float(_bits(element * scale[:, None]) | sign)
        tl.store(out_ptr + offsets, _to_view(value, VIEW), mask=exists[:, None])


@_jit
def dequantize_row_kernel(
    codes_ptr, scale_ptr, out_ptr, columns, COLUMNS: tl.constexpr, TILES: tl.constexpr, VIEW: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = _to_fp32(tl.load(scale_ptr + row))
    for tile in tl.static_range(TILES):
        offsets = tile * COLUMNS + tl.arange(0, COLUMNS)
        exists = offsets < columns
        codes = tl.load(codes_ptr + row * columns + offsets, mask=exists, other=0).to(tl.int32)
        value = _float(_bits(_fp8_element(codes & 0x7F)) | ((codes & 0x80) << 24)) * scale
        tl.store(out_ptr + row * columns + offsets, _to_view(value, VIEW), mask=exists)


@_jit
def dequantize_block_kernel(
    codes_ptr, scale_ptr, out_ptr, blocks, ROWS: tl.constexpr, SIZE: tl.constexpr, VIEW: tl.constexpr
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, SIZE)
    scale = _to_fp32(tl.load(scale_ptr + rows, mask=exists, other=0))
    codes = tl.load(codes_ptr + offsets, mask=exists[:, None], other=0).to(tl.int32)
    value = _float(_bits(_fp8_element(codes & 0x7F)) | ((codes & 0x80) << 24)) * scale[:, None]
    tl.store(out_ptr + offsets, _to_view(value, VIEW), mask=exists[:, None])


_QUANTIZE = quantize_row_kernel, quantize_block_kernel
_DEQUANTIZE = dequantize_row_kernel, dequantize_block_kernel
