"""MX quantization in plain PyTorch: the executable specification that every kernel is compared with, bit for bit.

No logarithm is taken. A block's exponent is the exponent field of its largest magnitude; an element is rounded to a
multiple of 2^k, ties to even, by adding and subtracting 1.5 * 2^(23 + k): the sum has no bits below 2^k, so FP32's own
rounding does the work. All arithmetic is FP32 and every multiplication is by a power of two, hence exact.

For finite input the results equal AutoRound's `quant_mx` (rule floor) and `quant_mx_rceil` (rule rceil) and the scales
of compressed-tensors (rule even), except where an FP32 log2 rounds up to the next integer: there the exact exponent
wins. A block that holds a NaN or an infinity becomes NaN as a whole (scale byte 0xFF).
"""

from __future__ import annotations

import torch

from .codes import decode, encode
from .formats import BLOCK_SIZE, E8M0_BIAS, E8M0_NAN, FP32_MANTISSA_BITS, MXFormat, mantissa_threshold

_EXPONENT_MASK = 0xFF


def quantize(
    x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed element codes and E8M0 scales.

    Args:
        x: [..., K] float32, bfloat16 or float16, K a multiple of 32.
        fmt: element format.
        rule: scale rule, see `formats.SCALE_RULES`.
        dtype: the view of `x` that is quantized (default: its own dtype), e.g. the bfloat16 view of FP32 master
        weights.

    Returns:
        packed codes, uint8 [..., K * fmt.bits / 8], and biased E8M0 scales, uint8 [..., K / 32].
    """
    elements, scale_e8m0_biased = _quantize_elements(x, fmt, rule, dtype)
    return encode(elements.nan_to_num(0.0), fmt).flatten(-2), scale_e8m0_biased


def dequantize(
    packed: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype`; blocks whose scale is 0xFF are NaN."""
    blocks = packed.unflatten(-1, (-1, fmt.packed_bytes_per_block))
    return _scale_back(decode(blocks, fmt), scale_e8m0_biased, dtype)


def fake_quantize(x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize(quantize(x))` without the bytes: x's nearest values on the MX grid, [..., K] in `dtype`."""
    elements, scale_e8m0_biased = _quantize_elements(x, fmt, rule, dtype)
    return _scale_back(elements, scale_e8m0_biased, dtype or x.dtype)


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Packed codes of x under given scales (uint8 [..., K / 32]) instead of a rule's; the layout of `quantize`."""
    elements = round_to_scale(x.to(dtype or x.dtype), scale_e8m0_biased, fmt)
    return encode(_in_blocks(elements.nan_to_num(0.0)), fmt).flatten(-2)


def saturates(x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat) -> torch.Tensor:
    """Which values of x [..., K] exceed the largest element of their block, |x| > max_normal * 2^(scale - 127): bool
    [..., K]. Blocks with the NaN scale have no such values."""
    limit = fmt.max_normal * _power_of_two(scale_e8m0_biased.int() - E8M0_BIAS)
    return (_in_blocks(x.float()).abs() > limit[..., None]).flatten(-2)


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))


def round_to_scale(x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat) -> torch.Tensor:
    """Nearest elements of x [..., K] under given scales (uint8 [..., K / 32]), in scaled units (FP32 [..., K])."""
    blocks = _in_blocks(x.float())
    return _round_elements(blocks, scale_e8m0_biased.int(), fmt).flatten(-2)


def _quantize_elements(x, fmt, rule, dtype):
    """Elements in scaled units (FP32 [..., K/32, 32]) and biased scales (uint8 [..., K/32])."""
    blocks = _in_blocks(x.to(dtype or x.dtype).float())
    amax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    scale = _shared_exponent(amax, fmt, rule)
    elements = _round_elements(blocks, scale, fmt)
    if rule == "search":
        scale_up = torch.where(scale < E8M0_NAN - 1, scale + 1, scale)
        elements_up = _round_elements(blocks, scale_up, fmt)
        scaled = blocks * _power_of_two(E8M0_BIAS - scale)[..., None]
        # Both errors in units of the floor scale; a NaN compares false and keeps floor's NaN scale.
        better = _block_error(scaled - 2 * elements_up) < _block_error(scaled - elements)
        scale = torch.where(better, scale_up, scale)
        elements = torch.where(better[..., None], elements_up, elements)
    return elements, scale.to(torch.uint8)


def _shared_exponent(amax: torch.Tensor, fmt: MXFormat, rule: str) -> torch.Tensor:
    """Biased E8M0 code (int32) for each block maximum (FP32, not negative)."""
    amax_bits = amax.view(torch.int32)
    exponent_field = amax_bits >> FP32_MANTISSA_BITS
    mantissa = amax_bits & ((1 << FP32_MANTISSA_BITS) - 1)
    # FP32's bias is E8M0's, so the field is already biased. Subnormal maxima (field 0) end at the smallest scale.
    code = exponent_field - fmt.emax + (mantissa >= mantissa_threshold(fmt, rule)).int()
    return torch.where(exponent_field == _EXPONENT_MASK, E8M0_NAN, code.clamp(min=0))


def _round_elements(blocks: torch.Tensor, scale: torch.Tensor, fmt: MXFormat) -> torch.Tensor:
    """Nearest element of `fmt` for each value, in scaled units; ties to even, saturating; NaN where the scale is."""
    scaled = blocks * _power_of_two(E8M0_BIAS - scale)[..., None]
    magnitude = scaled.abs()
    exponent = (magnitude.view(torch.int32) >> FP32_MANTISSA_BITS) - E8M0_BIAS
    step = exponent.clamp(fmt.emin, fmt.emax) - fmt.mantissa_bits
    magic = 1.5 * _power_of_two(step + FP32_MANTISSA_BITS)
    rounded = ((magnitude + magic) - magic).clamp(max=fmt.max_normal)
    # Adding 0.0 turns -0.0 into 0.0 and leaves the rest: a negative value that rounds to zero keeps its sign, as in
    # AutoRound; -0.0 itself, or a value so small that scaling it underflows, does not.
    return rounded.copysign(scaled + 0.0)


def _scale_back(elements: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (elements * _power_of_two(scale.int() - E8M0_BIAS)[..., None]).to(dtype).flatten(-2)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in FP32, exact for -127 .. 127; NaN for the exponents +-128 of the NaN scale."""
    field = (exponent + E8M0_BIAS) << FP32_MANTISSA_BITS
    smallest = 1 << (FP32_MANTISSA_BITS - 1)  # 2^-127 is subnormal
    value = torch.where(exponent == -127, smallest, field).int().view(torch.float32)
    return torch.where(exponent.abs() == 128, torch.nan, value)


def _block_error(difference: torch.Tensor) -> torch.Tensor:
    """Sum of squares over each block [..., 32] -> [...]; neighbours are added in pairs, so all kernels agree."""
    total = difference * difference
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]
