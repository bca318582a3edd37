"""What families share: rounding to the nearest element of a floating-point format, and the error of a block.

Rounding is in FP32 and needs no logarithms. A value is rounded to a multiple of 2^k, ties to even, by adding and
subtracting 1.5 * 2^(23 + k): the sum has no bits below 2^k, so FP32's own rounding does the work.
"""

from __future__ import annotations

import torch

from .formats import FP32_BIAS, FP32_MANTISSA_BITS, Element


def round_to_element(scaled: torch.Tensor, element: Element) -> torch.Tensor:
    """The nearest element for each value (FP32, in units of its scale): ties to even, saturating; NaN stays NaN."""
    magnitude = scaled.abs()
    exponent = (magnitude.view(torch.int32) >> FP32_MANTISSA_BITS) - FP32_BIAS
    step = exponent.clamp(element.emin, element.emax) - element.mantissa_bits
    magic = 1.5 * _normal_power_of_two(step + FP32_MANTISSA_BITS)
    rounded = ((magnitude + magic) - magic).clamp(max=element.largest)
    # Adding 0.0 turns -0.0 into 0.0 and leaves the rest: a negative value that rounds to zero keeps its sign, as in
    # AutoRound; -0.0 itself, or a value so small that scaling it underflows, does not.
    return rounded.copysign(scaled + 0.0)


def squared_error(difference: torch.Tensor) -> torch.Tensor:
    """Sums of squares over blocks [..., block] -> [...]; neighbours are added in pairs, so that all kernels agree."""
    total = difference * difference
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]


def _normal_power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in FP32 for -126 .. 127."""
    return ((exponent + FP32_BIAS) << FP32_MANTISSA_BITS).int().view(torch.float32)
