"""INT4 quantization (a BF16 scale for a block) in plain PyTorch: the executable specification of its kernels.

    s = bf16(amax / 7.5), q = clamp(round(w / s), -8, 7), value = q * s

The quotient is taken in FP32 and rounded to nearest, ties to even; the product is rounded to the dtype of the result.
Weights only: engines that serve this format (vLLM's `pack-quantized`) leave activations alone.

A block that holds a NaN or an infinity becomes NaN as a whole (its scale is NaN).
"""

from __future__ import annotations

import torch

from .codes import decode, encode
from .elements import squared_error
from .formats import BF16, INT4, Format, Quantized
from .rules import INT4_RULES

FORMATS = {
    name: Format(name, INT4, block, BF16, INT4_RULES, (), "int")
    for name, block in (("int4_g32", 32), ("int4_g128", 128))
}
_ABSMAX_DIVISOR = 7.5  # half of the 15 steps from -8 to 7
_SEARCHED_DIVISORS = (8.0, 7.5, 7.0)
SMALLEST_SCALE = float(torch.finfo(torch.bfloat16).tiny)  # a block of zeros has no scale of its own
SMALLEST, LARGEST = -8.0, INT4.largest


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize to INT4 codes and a scale for each block.

    Args:
        x: [..., K] float32, bfloat16 or float16, K a multiple of the block.
        fmt: one of FORMATS.
        rule: one of `fmt.rules`.
        dtype: the view of `x` that is quantized (default: its own dtype).

    Returns:
        codes, uint8 [..., K / 2], and the scales, BF16 [..., K / block].
    """
    elements, scale = _quantize_elements(x, fmt, rule, dtype)
    return Quantized(encode(elements.nan_to_num(0.0), INT4).flatten(-2), (scale,))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype`; blocks whose scale is NaN are NaN."""
    (scale,) = quantized.scales
    return _scale_back(_in_blocks(decode(quantized.codes, INT4), fmt), scale, dtype)


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize(quantize(x))`: [..., K] in `dtype`."""
    elements, scale = _quantize_elements(x, fmt, rule, dtype)
    return _scale_back(elements, scale, dtype or x.dtype)


def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales (BF16 [..., K / block]) instead of a rule's; the layout of `quantize`."""
    fmt.check_scales(x.shape, scale)
    elements = _round_elements(_in_blocks(x.to(dtype or x.dtype).float(), fmt), scale)
    return encode(elements.nan_to_num(0.0), INT4).flatten(-2)


def saturates(x: torch.Tensor, quantized: Quantized, fmt: Format) -> torch.Tensor:
    """Which values of x [..., K] lie beyond the last element of their side, 7 or -8 steps from 0: bool [..., K]."""
    blocks, scale = _in_blocks(x.float(), fmt), quantized.scales[0].float()[..., None]
    return ((blocks > LARGEST * scale) | (blocks < SMALLEST * scale)).flatten(-2)


def broken_blocks(quantized: Quantized, fmt: Format) -> torch.Tensor:
    """How many blocks held NaN or infinity; int64 scalar."""
    return quantized.scales[0].isnan().sum()


def _in_blocks(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    assert fmt.block is not None, fmt.name
    return x.unflatten(-1, (x.shape[-1] // fmt.block, fmt.block))


def _quantize_elements(x, fmt, rule, dtype):
    """Elements (FP32 [..., K / block, block]) and scales (BF16 [..., K / block])."""
    blocks = _in_blocks(x.to(dtype or x.dtype).float(), fmt)
    amax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    if rule == "absmax":
        scale = _scale(amax, _ABSMAX_DIVISOR)
        return _round_elements(blocks, scale), scale
    error, scale, elements = _rounded_by(blocks, amax, _SEARCHED_DIVISORS[0])
    for divisor in _SEARCHED_DIVISORS[1:]:
        other_error, other_scale, other_elements = _rounded_by(blocks, amax, divisor)
        better = other_error < error  # a NaN compares false and keeps the first scale, which is NaN too
        error, scale = torch.where(better, other_error, error), torch.where(better, other_scale, scale)
        elements = torch.where(better[..., None], other_elements, elements)
    return elements, scale


def _rounded_by(blocks, amax, divisor):
    """Squared error, scale and elements of each block under the scale amax / divisor."""
    scale = _scale(amax, divisor)
    elements = _round_elements(blocks, scale)
    return squared_error(blocks - elements * scale.float()[..., None]), scale, elements


def _scale(amax: torch.Tensor, divisor: float) -> torch.Tensor:
    scale = (amax / divisor).bfloat16().clamp(min=SMALLEST_SCALE)
    return torch.where(amax.isfinite(), scale, torch.nan).bfloat16()


def _round_elements(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # + 0.0: an integer has no negative zero.
    return (blocks / scale.float()[..., None]).round().clamp(SMALLEST, LARGEST) + 0.0


def _scale_back(elements: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (elements * scale.float()[..., None]).to(dtype).flatten(-2)
