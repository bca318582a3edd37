"""NVFP4 on the GPU, bit-equal to `nvfp4.py`: a program takes several blocks of 16 values."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Format, Quantized
from ..nvfp4 import BLOCK, FORMATS, tensor_divisor
from .triton_blocks import _corrected, _divide, _magnitude, _sum_of_squares, _unpack
from .triton_device import (
    _as_words,
    _bits,
    _code,
    _float,
    _jit,
    _offsets,
    _round_magnitude,
    _round_to_code,
    _sign,
    _tile,
    _to_fp32,
    _to_view,
    tl,
    triton,
)
from .triton_fp8 import _fp8_code, _fp8_element
from .triton_kernels import check_dtype, check_tensor, is_available, prepare, triton_dtype
from .triton_launch import launch

SERVES = tuple(FORMATS)
# Values and warps of a program. One warp decides without shared memory whether it divides, see `_is_plain`.
_TILES = {"fake_quantize": (1024, 1), "search": (512, 1), "quantize": (1024, 1), "dequantize": (1024, 2)}

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


def fake_quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """Same arguments and bits as `nvfp4.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    divisor = _of(x, dtype) if divisor is None else divisor
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    name = "search" if rule == "search" else "fake_quantize"
    _launch(name, quantize_kernel, (x, out, out, divisor), x.numel(), _options(rule, dtype, to_codes=False))
    return out


def quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> Quantized:
    """Codes and scales; same arguments and bytes as `nvfp4.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    divisor = _of(x, dtype) if divisor is None else divisor
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    scale = torch.empty(fmt.scale_shape(x.shape), dtype=torch.uint8, device=x.device)
    tensors = (x, codes.view(torch.int32), scale, divisor)
    _launch("quantize", quantize_kernel, tensors, x.numel(), _options(rule, dtype, to_codes=True))
    return Quantized(codes, (scale.view(torch.float8_e4m3fn), divisor))


def quantize_to_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype | None = None,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `nvfp4.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = prepare(x, fmt, dtype)
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(x.shape, scale)
    divisor = _of(x, dtype) if divisor is None else divisor
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    tensors = (x, codes.view(torch.int32), scale.contiguous().view(torch.uint8), divisor)
    _launch("quantize", to_scale_kernel, tensors, x.numel(), {"VIEW": triton_dtype(dtype)})
    return codes


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `nvfp4.dequantize`."""
    codes, (scale, divisor) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(shape, scale)
    check_dtype(dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    tensors = (codes.contiguous(), scale.contiguous().view(torch.uint8), out, divisor)
    _launch("dequantize", dequantize_kernel, tensors, out.numel(), {"VIEW": triton_dtype(dtype)})
    return out


def _of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor_divisor(x.abs().max().to(dtype) if x.numel() else x.new_zeros(()))


def _options(rule: str, dtype: torch.dtype, to_codes: bool) -> dict:
    native, search = rule == "absmax_native", rule == "search"
    return {"NATIVE": native, "SEARCH": search, "TO_CODES": to_codes, "VIEW": triton_dtype(dtype)}


def _launch(name: str, kernel: Any, tensors: tuple[torch.Tensor, ...], values: int, options: dict) -> None:
    if blocks := values // BLOCK:
        options["EACH"] = 0 if tensors[3].numel() == 1 else blocks // tensors[3].numel()
        tile, warps = _TILES[name]
        rows = tile // BLOCK
        launch(kernel, (triton.cdiv(blocks, rows),), tensors, blocks, ROWS=rows, num_warps=warps, **options)


@_jit
def _divisors(divisor_ptr, rows, exists, ROWS: tl.constexpr, EACH: tl.constexpr):
    """Of each block: that of the tensor, or of the EACH blocks that it is one of."""
    if EACH:
        return tl.load(divisor_ptr + rows // EACH, mask=exists, other=1.0)
    return tl.zeros((ROWS,), tl.float32) + tl.load(divisor_ptr)


@_jit
def _reciprocals(divisor_ptr, divisor, ROWS: tl.constexpr, EACH: tl.constexpr):
    """1 over the divisors, rounded as in IEEE 754."""
    if EACH:
        return tl.math.div_rn(tl.full((ROWS,), 1.0, tl.float32), divisor)
    return tl.zeros((ROWS,), tl.float32) + tl.math.div_rn(1.0, tl.load(divisor_ptr))


@_jit
def _scale_code(amax, sixth, divisor, NATIVE: tl.constexpr, VIEW: tl.constexpr):
    """Codes of the blocks' scales from their largest magnitudes and these over 6."""
    if NATIVE:
        sixth = _to_fp32(_to_view(sixth, VIEW))
    code = _fp8_code(tl.minimum(_bits(sixth * divisor) & 0x7FFFFFFF, 0x43E00000))  # 448
    return tl.where(code == 0, 0x20, code)  # 0.125


@_jit
def _sixth(amax, DIVIDES: tl.constexpr):
    """Magnitudes (FP32 bits) over 6; by a product that is corrected once if they are not tiny."""
    amax = _float(amax)
    six = tl.full(amax.shape, 6.0, tl.float32)
    if DIVIDES:
        return tl.math.div_rn(amax, six)
    quotient = amax * (1.0 / 6.0)
    return tl.fma(tl.fma(quotient, -6.0 + tl.zeros_like(amax), amax), 1.0 / 6.0 + tl.zeros_like(amax), quotient)


@_jit
def _effective(code, divisor, reciprocal, DIVIDES: tl.constexpr):
    """Scales (FP32) over the divisor."""
    scale = _fp8_element(code)
    return tl.math.div_rn(scale, divisor) if DIVIDES else _corrected(scale, divisor, reciprocal)


@_jit
def _round_over(magnitude, effective, ROWS: tl.constexpr, SATURATES: tl.constexpr, DIVIDES: tl.constexpr):
    """Elements (FP32) nearest to magnitudes [ROWS, 16] over the scales [ROWS] of their blocks; see `_is_plain`."""
    if DIVIDES:
        quotient = _divide(magnitude, effective, ROWS, 16)
    else:
        reciprocal = tl.broadcast_to((1.0 / effective)[:, None], (ROWS, 16))
        quotient = magnitude * reciprocal
        rest = tl.fma(quotient, tl.broadcast_to((-effective)[:, None], (ROWS, 16)), magnitude)
        quotient = tl.fma(rest, reciprocal, quotient)
    if SATURATES:
        quotient = tl.minimum(quotient, 6.0)
    return _round_magnitude(quotient, 1.0, 1)


@_jit
def _is_close(effective):
    bits = _bits(effective)
    return ((bits & 0x3FFFFF) != 0) & (((bits + 96) & 0x3FFFFF) <= 192)


@_jit
def _is_plain(smallest, effective, largest, is_close, amax, divisor, LARGEST: tl.constexpr):
    """Blocks whose values may be divided by multiplying with r, about 1 / s, and correcting the product once.

    What the correction gives is q + r (x - q s), rounded, with q = x r and an exact x - q s. Its error before rounding
    is that of r, relative to at most 5 units of the last place: less than 2^-22 * 5 units. Elements depend on it only
    where x / s is that close to one of the numbers m, half a unit above or below a limit h between two elements, at
    which division rounds to h or beside it. Let S be s as an integer of 24 bits. h having 3 bits, x - m s is a multiple
    of 2^22 plus or minus S, in units in which it would have to be less than 80; it is not 0, since m has 25 bits and x
    at most 24. So S modulo 2^22 is another number than 0 and within 80 of a multiple of 2^22, or all is well.

    The other conditions: nothing overflows, no rest of a quotient that counts is subnormal, no quotient underflows to
    zero, whose sign would be lost, and no value is rounded to more than 6 under the block's own scale.
    """
    in_range = (smallest >= 5.421010862427522e-20) & (largest <= LARGEST) & (amax < 0x5D800000)  # 2^-64, 2^60
    in_range &= (divisor >= 5.421010862427522e-20) & (divisor <= 18446744073709551616.0)  # 2^-64, 2^64
    return in_range & (_float(amax) <= 6.875 * effective) & (is_close == 0)


@_jit
def _error(magnitude, elements, effective, ROWS: tl.constexpr):
    return _sum_of_squares(magnitude - elements * effective[:, None], ROWS, 16)


@_jit
def _neighbour(code, step):
    return tl.minimum(tl.maximum(code + step, 1), 0x7E)


@_jit
def _round_blocks(
    magnitude, code, above, below, effective, effective_above, effective_below, ROWS: tl.constexpr,
    SEARCH: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """Elements' magnitudes [ROWS, 16] and codes of the scales [ROWS]; in a search the best of three."""
    elements = _round_over(magnitude, effective, ROWS, DIVIDES, DIVIDES)
    if SEARCH:
        least = _error(magnitude, elements, effective, ROWS)
        others = _round_over(magnitude, effective_above, ROWS, DIVIDES, DIVIDES)
        error = _error(magnitude, others, effective_above, ROWS)
        is_better = error < least
        least = tl.where(is_better, error, least)
        code, effective = tl.where(is_better, above, code), tl.where(is_better, effective_above, effective)
        elements = tl.where(is_better[:, None], others, elements)
        others = _round_over(magnitude, effective_below, ROWS, True, DIVIDES)
        is_better = _error(magnitude, others, effective_below, ROWS) < least
        code, effective = tl.where(is_better, below, code), tl.where(is_better, effective_below, effective)
        elements = tl.where(is_better[:, None], others, elements)
    return elements, code, effective


@_jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    divisor_ptr,
    blocks,
    ROWS: tl.constexpr,
    EACH: tl.constexpr,
    NATIVE: tl.constexpr,
    SEARCH: tl.constexpr,
    TO_CODES: tl.constexpr,
    VIEW: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, 16)
    x = _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + offsets, mask=exists[:, None], other=0)), VIEW))
    divisor = _divisors(divisor_ptr, rows, exists, ROWS, EACH)
    magnitude = _magnitude(x)
    amax = tl.max(_bits(magnitude), axis=1)  # compared as integers, NaN and infinity come out on top
    reciprocal = _reciprocals(divisor_ptr, divisor, ROWS, EACH)
    code = _scale_code(amax, _sixth(amax, False), divisor, NATIVE, VIEW)
    above, below = _neighbour(code, 1), _neighbour(code, -1)
    effective = _effective(code, divisor, reciprocal, False)
    effective_above, effective_below, is_close = effective, effective, _is_close(effective)
    if SEARCH:
        effective_above = _effective(above, divisor, reciprocal, False)
        effective_below = _effective(below, divisor, reciprocal, False)
        is_close |= _is_close(effective_above) | _is_close(effective_below)
    largest: tl.constexpr = 1.0 if tl.float32 == VIEW else 32768.0
    is_plain = _is_plain(effective_below, effective, effective_above, is_close, amax, divisor, largest)
    if tl.min(is_plain.to(tl.int32), axis=0) > 0:
        elements, code, effective = _round_blocks(
            magnitude, code, above, below, effective, effective_above, effective_below, ROWS, SEARCH, False
        )
        sign = _sign(x)
    else:
        code = _scale_code(amax, _sixth(amax, True), divisor, NATIVE, VIEW)
        above, below = _neighbour(code, 1), _neighbour(code, -1)
        effective = _effective(code, divisor, reciprocal, True)
        effective_above = _effective(above, divisor, reciprocal, True)
        effective_below = _effective(below, divisor, reciprocal, True)
        elements, code, effective = _round_blocks(
            magnitude, code, above, below, effective, effective_above, effective_below, ROWS, SEARCH, True
        )
        sign = _sign(_divide(x, effective, ROWS, 16))
    broken = amax >= 0x7F800000
    if TO_CODES:
        tl.store(scale_ptr + rows, tl.where(broken, 0x7F, code).to(tl.uint8), mask=exists)
        words = tl.where(broken[:, None], 0, _as_words(_code(elements, sign, 0, 1, 4), ROWS, 2, 4))
        tl.store(out_ptr + _offsets(rows, 2), words, mask=exists[:, None])
    else:
        value = _float(_bits(elements) | sign) * tl.where(broken, float("nan"), effective)[:, None]
        tl.store(out_ptr + offsets, _to_view(value, VIEW), mask=exists[:, None])


@_jit
def _given_scale(scale_ptr, rows, exists):
    code = tl.load(scale_ptr + rows, mask=exists, other=0).to(tl.int32)
    return _float(_bits(_fp8_element(code & 0x7F)) | (code & 0x80) << 24)


@_jit
def to_scale_kernel(
    x_ptr, out_ptr, scale_ptr, divisor_ptr, blocks, ROWS: tl.constexpr, EACH: tl.constexpr, VIEW: tl.constexpr
):
    rows, exists = _tile(blocks, ROWS)
    x = _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + _offsets(rows, 16), mask=exists[:, None], other=0)), VIEW))
    divisor = _divisors(divisor_ptr, rows, exists, ROWS, EACH)
    effective = tl.math.div_rn(_given_scale(scale_ptr, rows, exists), divisor)
    codes = _round_to_code(tl.clamp(_divide(x, effective, ROWS, 16), -6.0, 6.0), 0, 1, 4, 6.0)
    words = tl.where((effective == effective)[:, None], _as_words(codes, ROWS, 2, 4), 0)
    tl.store(out_ptr + _offsets(rows, 2), words, mask=exists[:, None])


@_jit
def dequantize_kernel(
    packed_ptr, scale_ptr, out_ptr, divisor_ptr, blocks, ROWS: tl.constexpr, EACH: tl.constexpr, VIEW: tl.constexpr
):
    rows, exists = _tile(blocks, ROWS)
    codes = _unpack(packed_ptr, rows, exists, ROWS, 16)
    # As in triton_device.py: exponent and mantissa where FP32 has them, then one exact product for the biases.
    element = _float((codes & 7) << 22) * 85070591730234615865843651857942052864.0  # 2^126
    value = _float(_bits(element) | (codes >> 3) << 31)
    divisor = _divisors(divisor_ptr, rows, exists, ROWS, EACH)
    effective = tl.math.div_rn(_given_scale(scale_ptr, rows, exists), divisor)
    tl.store(out_ptr + _offsets(rows, 16), _to_view(value * effective[:, None], VIEW), mask=exists[:, None])
