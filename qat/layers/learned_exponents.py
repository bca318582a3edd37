"""Learned exponents of weights in MX formats: that of a block is the scale rule's plus a trained offset, rounded.

As in LSQ (Esser et al., arXiv:1902.08153) rounding passes gradients straight through, also that of the offset; with
v = 2^e q(w / 2^e)

    dv/de = ln 2 * (v - w), or ln 2 * v where w saturates,

summed over the block and multiplied by 1 / sqrt(block * largest element), LSQ's gradient scale. (AutoRound tunes a
factor on the block's maximum, before the rule takes its logarithm; an offset of the exponent is the logarithm of such a
factor.)

A finished run saves the quantized values, which are multiples of a power of two, exact in BF16. Rounding them again
must give them back, whatever exponents they were made with, and under the rule RCEIL it does: RCEIL takes the finest
scale under which a block's maximum does not saturate, so the learned scale or a finer one, on whose grid all values of
the block lie as well. (FLOOR may read a maximum of 240 as 480 of the next finer scale, which saturates at 448.)
"""

from __future__ import annotations

import math

import torch

from ..numerics import mx, ops
from ..numerics.formats import Quantized
from .rounding import LearnedRounding

PARAMETER = "exponent_offset"  # of a weight quantizer, FP32 [N, K / block]
SUFFIX = f".weight_quantizer.{PARAMETER}"  # of its name in a state dict
SETTING = "learn_exponent"  # in QATConfig.training
FORMATS = tuple(mx.FORMATS)
BAKED_RULE = "rceil"  # of the weights that a finished run saves


class LearnedExponents(LearnedRounding):
    """`Rounding` with an offset of the exponents as its one parameter."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, under the moved exponents."""
        (offset,) = learned
        (scale,) = super().quantize(weight, dtype).scales
        moved = (scale.int() + offset.round().int()).clamp(0, mx.E8M0_NAN - 1).to(torch.uint8)
        scale = torch.where((scale == mx.E8M0_NAN) | offset.isnan(), mx.E8M0_NAN, moved)
        return Quantized(ops.quantize_to_scale(weight, scale, self.spec.format.name, dtype), (scale,))

    def learned_gradients(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        *learned: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The gradient of the offset, FP32 [N, K / block]."""
        quantized, fmt = self.quantize(weight, dtype, *learned), self.spec.format
        assert fmt.block is not None, fmt.name
        values = ops.dequantize(quantized, fmt.name, torch.float32)
        viewed = weight.to(dtype).float()
        slope = torch.where(mx.saturates(viewed, quantized, fmt), values, values - viewed)
        blocks = (grad.float() * slope).unflatten(-1, (grad.shape[-1] // fmt.block, fmt.block))
        return (blocks.sum(-1) * (math.log(2) / math.sqrt(fmt.block * fmt.element.largest)),)
