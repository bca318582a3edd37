"""The INT4 formats on the GPU, bit-equal to `integer.py`: a program takes several blocks."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Format, Quantized
from ..integer import FORMATS
from .triton_blocks import _divide, _largest_bits, _sum_of_squares, _unpack
from .triton_device import _as_words, _bits, _float, _jit, _offsets, _tile, _to_fp32, _to_view, tl, triton
from .triton_kernels import check_dtype, check_tensor, is_available, prepare, triton_dtype
from .triton_launch import launch

SERVES = tuple(FORMATS)
# Values and warps of a program, the fastest of eight on an H100.
_TILES = {"fake_quantize": (512, 2), "search": (1024, 2), "quantize": (1024, 1), "dequantize": (2048, 2)}

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Same arguments and bits as `integer.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    search = rule == "search"
    options = {"SEARCH": search, "GIVEN": False, "TO_CODES": False, **_dtypes(dtype)}
    _launch("search" if search else "fake_quantize", quantize_kernel, (x, out, out), x.numel(), fmt, options)
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and scales; same arguments and bytes as `integer.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    scale = torch.empty(fmt.scale_shape(x.shape), dtype=torch.bfloat16, device=x.device)
    codes = _codes(x, scale, fmt, dtype, {"SEARCH": rule == "search", "GIVEN": False})
    return Quantized(codes, (scale,))


def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `integer.quantize_to_scale`."""
    x, dtype = prepare(x, fmt, dtype)
    fmt.check_scales(x.shape, scale)
    return _codes(x, scale.contiguous(), fmt, dtype, {"SEARCH": False, "GIVEN": True})


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `integer.dequantize`."""
    codes, (scale,) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(shape, scale)
    check_dtype(dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    tensors = (codes.contiguous(), scale.contiguous().view(torch.int16), out)
    _launch("dequantize", dequantize_kernel, tensors, out.numel(), fmt, {"VIEW": triton_dtype(dtype)})
    return out


def _codes(x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype, options: dict) -> torch.Tensor:
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    options |= {"TO_CODES": True, **_dtypes(dtype)}
    _launch("quantize", quantize_kernel, (x, codes.view(torch.int32), scale.view(torch.int16)), x.numel(), fmt, options)
    return codes


def _dtypes(dtype: torch.dtype) -> dict:
    return {"VIEW": triton_dtype(dtype), "BF16": triton_dtype(torch.bfloat16)}


def _launch(name: str, kernel: Any, tensors: tuple[torch.Tensor, ...], values: int, fmt: Format, options: dict) -> None:
    assert fmt.block is not None, fmt.name
    if blocks := values // fmt.block:
        tile, warps = _TILES[name]
        rows = tile // fmt.block
        options |= {"ROWS": rows, "SIZE": fmt.block, "num_warps": warps}
        launch(kernel, (triton.cdiv(blocks, rows),), tensors, blocks, **options)


@_jit
def _scale(amax_bits, DIVISOR: tl.constexpr, DIVIDES: tl.constexpr, BF16: tl.constexpr):
    """Scales (FP32) without regard to NaN and infinity. Unless it DIVIDES, maxima have at most 11 bits."""
    amax = _float(amax_bits)
    if DIVIDES:
        quotient = tl.math.div_rn(amax, tl.zeros_like(amax) + DIVISOR)
    else:
        # A product with the reciprocal, corrected once. It is exact where amax / d has 9 bits, as numbers halfway
        # between two of BF16 have; another amax / d is at least 2^-13 from those, relative to itself.
        quotient = amax * (1.0 / DIVISOR)
        rest = tl.fma(quotient, tl.full(amax.shape, -DIVISOR, tl.float32), amax)
        quotient = tl.fma(rest, tl.full(amax.shape, 1.0 / DIVISOR, tl.float32), quotient)
    return tl.maximum(_to_fp32(_to_view(quotient, BF16)), 1.1754943508222875e-38)


@_jit
def _elements(x, scale, ROWS: tl.constexpr, SIZE: tl.constexpr, DIVIDES: tl.constexpr):
    """-8 to 7 (FP32), ties to even. Unless it DIVIDES, x has at most 11 bits and the scales come from its maxima.

    Then no quotient is needed. x / s is either halfway between two integers or at least 2^-13 from there: with h half
    an integer, h s is a multiple of half the last place of s, and x of its own last place, so that |x - h s| is 0 or
    at least s / 512 or |x| / 2^11. x times an approximation of 1 / s is off by less than 2^-18. Rounded to multiples of
    2^-16, by adding 192, it is exactly h where x / s is, and else on the same side of h.
    """
    if DIVIDES:
        quotient = tl.maximum(_divide(x, scale, ROWS, SIZE), -8.0)
        return (tl.minimum(quotient, 7.0) + 12582912.0) - 12582912.0  # 1.5 * 2^23
    steps = tl.fma(x, tl.broadcast_to((1.0 / scale)[:, None], (ROWS, SIZE)), tl.full((ROWS, SIZE), 192.0, tl.float32))
    # No scale makes a quotient less than -8.04, and that is rounded to -8.
    return (tl.minimum(steps, 199.0) + 12582720.0) - 12582912.0


@_jit
def _error(x, scale, ROWS: tl.constexpr, SIZE: tl.constexpr, DIVIDES: tl.constexpr):
    if DIVIDES:
        elements = _elements(x, scale, ROWS, SIZE, True)
    else:
        # Halfway between two elements both are equally far, so any of them will do.
        reciprocal = tl.broadcast_to((1.0 / scale)[:, None], (ROWS, SIZE))
        elements = tl.fma(x, reciprocal, tl.full((ROWS, SIZE), 12582912.0, tl.float32)) - 12582912.0
        elements = tl.minimum(elements, 7.0)
    # The product of 4 and 8 bits is exact, so it does not matter that it is fused.
    difference = tl.fma(elements, tl.broadcast_to((-scale)[:, None], (ROWS, SIZE)), x)
    return _sum_of_squares(difference, ROWS, SIZE)


@_jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    blocks,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    GIVEN: tl.constexpr,
    TO_CODES: tl.constexpr,
    VIEW: tl.constexpr,
    BF16: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, SIZE)
    x = _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + offsets, mask=exists[:, None], other=0)), VIEW))
    divides: tl.constexpr = GIVEN or tl.float32 == VIEW
    if GIVEN:
        scale = _to_fp32(tl.load(scale_ptr + rows, mask=exists, other=1))
    else:
        amax = _largest_bits(x)
        if SEARCH:
            scale = _scale(amax, 8.0, divides, BF16)
            least = _error(x, scale, ROWS, SIZE, divides)
            other = _scale(amax, 7.5, divides, BF16)
            error = _error(x, other, ROWS, SIZE, divides)
            scale = tl.where(error < least, other, scale)
            least = tl.where(error < least, error, least)
            other = _scale(amax, 7.0, divides, BF16)
            error = _error(x, other, ROWS, SIZE, divides)
            scale = tl.where(error < least, other, scale)
        else:
            scale = _scale(amax, 7.5, divides, BF16)
        scale = tl.where(amax >= 0x7F800000, float("nan"), scale)
    elements = _elements(x, scale, ROWS, SIZE, divides)
    if TO_CODES:
        if not GIVEN:
            tl.store(scale_ptr + rows, (_bits(scale) >> 16).to(tl.int16), mask=exists)  # exact: it is a BF16 number
        codes = (_bits(elements + 12582920.0) << 28).to(tl.uint32, bitcast=True)  # 1.5 * 2^23 + 8: the lowest bits
        words = tl.where((scale == scale)[:, None], _as_words(codes, ROWS, SIZE // 8, 4), -0x77777778)
        tl.store(out_ptr + _offsets(rows, SIZE // 8), words, mask=exists[:, None])
    else:
        tl.store(out_ptr + offsets, _to_view(elements * scale[:, None], VIEW), mask=exists[:, None])


@_jit
def dequantize_kernel(
    packed_ptr, scale_ptr, out_ptr, blocks, ROWS: tl.constexpr, SIZE: tl.constexpr, VIEW: tl.constexpr
):
    rows, exists = _tile(blocks, ROWS)
    elements = (_unpack(packed_ptr, rows, exists, ROWS, SIZE) - 8).to(tl.float32)
    scale = _to_fp32(tl.load(scale_ptr + rows, mask=exists, other=0))
    out = _to_view(elements * scale[:, None], VIEW)
    tl.store(out_ptr + _offsets(rows, SIZE), out, mask=exists[:, None])
