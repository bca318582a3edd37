"""MX quantization in plain PyTorch: the executable specification that every kernel is compared with, bit for bit.

No logarithm is taken. A block's exponent is the exponent field of its largest magnitude; elements.py rounds to the
nearest element. All arithmetic is FP32 and every multiplication is by a power of two, hence exact.

For finite input the results equal AutoRound's `quant_mx` (rule floor) and `quant_mx_rceil` (rule rceil) and the scales
of compressed-tensors (rule even), except where an FP32 log2 rounds up to the next integer: there the exact exponent
wins. A block that holds a NaN or an infinity becomes NaN as a whole (scale byte 0xFF).
"""

from __future__ import annotations

import torch

from .codes import decode, encode
from .elements import round_to_element, squared_error
from .formats import E2M1, E4M3, E8M0, FP32_BIAS, FP32_MANTISSA_BITS, Format, Quantized
from .rules import MX_INPUT_RULES, MX_RULES, mantissa_threshold

BLOCK = 32  # OCP MX v1.0, section 5.2: every concrete MX format has k = 32
FORMATS = {
    name: Format(name, element, BLOCK, E8M0, MX_RULES, MX_INPUT_RULES, "mx_fp")
    for name, element in (("mxfp4", E2M1), ("mxfp8", E4M3))
}
E8M0_BIAS = FP32_BIAS  # section 5.4.1; that of FP32, so an exponent field is a scale already
E8M0_NAN = 0xFF
_EXPONENT_MASK = 0xFF


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize to element codes and E8M0 scales.

    Args:
        x: [..., K] float32, bfloat16 or float16, K a multiple of 32.
        fmt: one of FORMATS.
        rule: one of `rules.MX_RULES`.
        dtype: the view of `x` that is quantized (default: its own dtype), e.g. the bfloat16 view of FP32 master
            weights.

    Returns:
        codes, uint8 [..., K * bits / 8], and the biased scales, uint8 [..., K / 32].
    """
    elements, scale_e8m0_biased = _quantize_elements(x, fmt, rule, dtype)
    return Quantized(encode(elements.nan_to_num(0.0), fmt.element).flatten(-2), (scale_e8m0_biased,))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype`; blocks whose scale is 0xFF are NaN."""
    (scale_e8m0_biased,) = quantized.scales
    elements = _in_blocks(decode(quantized.codes, fmt.element), fmt)
    return _scale_back(elements, scale_e8m0_biased, dtype)


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize(quantize(x))` without the bytes: x's nearest values on the MX grid, [..., K] in `dtype`."""
    elements, scale_e8m0_biased = _quantize_elements(x, fmt, rule, dtype)
    return _scale_back(elements, scale_e8m0_biased, dtype or x.dtype)


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales (uint8 [..., K / 32]) instead of a rule's; the layout of `quantize`."""
    viewed = x.to(dtype or x.dtype).float()
    fmt.check_scales(x.shape, scale_e8m0_biased)
    elements = _round_elements(_in_blocks(viewed, fmt), scale_e8m0_biased.int(), fmt)
    return encode(elements.nan_to_num(0.0), fmt.element).flatten(-2)


def saturates(x: torch.Tensor, quantized: Quantized, fmt: Format) -> torch.Tensor:
    """Which values of x [..., K] exceed the largest element of their block, |x| > largest * scale: bool [..., K].

    Blocks with the NaN scale have no such values.
    """
    limit = fmt.element.largest * _power_of_two(quantized.scales[0].int() - E8M0_BIAS)
    return (_in_blocks(x.float(), fmt).abs() > limit[..., None]).flatten(-2)


def broken_blocks(quantized: Quantized, fmt: Format) -> torch.Tensor:
    """How many blocks held NaN or infinity: those with the NaN scale; int64 scalar."""
    return (quantized.scales[0] == E8M0_NAN).sum()


def _in_blocks(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    assert fmt.block is not None, fmt.name
    return x.unflatten(-1, (x.shape[-1] // fmt.block, fmt.block))


def _quantize_elements(x, fmt, rule, dtype):
    """Elements in scaled units (FP32 [..., K/32, 32]) and biased scales (uint8 [..., K/32])."""
    blocks = _in_blocks(x.to(dtype or x.dtype).float(), fmt)
    amax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    scale = _shared_exponent(amax, fmt, rule)
    elements = _round_elements(blocks, scale, fmt)
    if rule == "search":
        scale_up = torch.where(scale < E8M0_NAN - 1, scale + 1, scale)
        elements_up = _round_elements(blocks, scale_up, fmt)
        scaled = blocks * _power_of_two(E8M0_BIAS - scale)[..., None]
        # Both errors in units of the floor scale; a NaN compares false and keeps floor's NaN scale.
        better = squared_error(scaled - 2 * elements_up) < squared_error(scaled - elements)
        scale = torch.where(better, scale_up, scale)
        elements = torch.where(better[..., None], elements_up, elements)
    return elements, scale.to(torch.uint8)


def _shared_exponent(amax: torch.Tensor, fmt: Format, rule: str) -> torch.Tensor:
    """Biased E8M0 code (int32) for each block maximum (FP32, not negative)."""
    amax_bits = amax.view(torch.int32)
    exponent_field = amax_bits >> FP32_MANTISSA_BITS
    mantissa = amax_bits & ((1 << FP32_MANTISSA_BITS) - 1)
    # FP32's bias is E8M0's, so the field is already biased. Subnormal maxima (field 0) end at the smallest scale.
    code = exponent_field - fmt.element.emax + (mantissa >= mantissa_threshold(fmt.element, rule)).int()
    return torch.where(exponent_field == _EXPONENT_MASK, E8M0_NAN, code.clamp(min=0))


def _round_elements(blocks: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Nearest element of `fmt` for each value, in scaled units; ties to even, saturating; NaN where the scale is."""
    return round_to_element(blocks * _power_of_two(E8M0_BIAS - scale)[..., None], fmt.element)


def _scale_back(elements: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (elements * _power_of_two(scale.int() - E8M0_BIAS)[..., None]).to(dtype).flatten(-2)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in FP32, exact for -127 .. 127; NaN for the exponents +-128 of the NaN scale."""
    field = (exponent + E8M0_BIAS) << FP32_MANTISSA_BITS
    smallest = 1 << (FP32_MANTISSA_BITS - 1)  # 2^-127 is subnormal
    value = torch.where(exponent == -127, smallest, field).int().view(torch.float32)
    return torch.where(exponent.abs() == 128, torch.nan, value)
