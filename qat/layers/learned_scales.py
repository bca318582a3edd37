"""Learned scales of weights in NVFP4 and INT4: the scale of a block is the scale rule's times a trained factor.

This is LSQ (Esser et al., arXiv:1902.08153) with a scale for each block, relative to that of the rule: for the rule's
scale s0 and the trained offset d, which is zero at first,

    s = round(s0 * (1 + d)), v = s * q(w / s),

where `round` goes to the numbers that a scale can be (INT4: BF16; NVFP4: E4M3, relative to the tensor's divisor g). So
the scale follows its weights, and a run starts from the numbers of the rule, bit for bit. Roundings pass gradients
straight through:

    dv/ds = q - w / s, or q where w saturates;    dv/dd = s0 * dv/ds,

summed over the block and multiplied by LSQ's gradient scale, 1 / sqrt(block * largest element). The offset is seen in
BF16, as weights are, so that FSDP may gather it in either dtype.

NVFP4's blocks whose scale is 448 under `absmax` are not learned, and keep it under `search` too: they hold the largest
magnitude of the tensor, of which g is made. So the quantized values have the same largest magnitude, and the same g
follows from them.

A finished run saves the quantized values in BF16. Their scales do not follow by a rule. The layers of such a folder
compute with the values as they are, and an export finds codes and scales again, see `baked_values.py`.
"""

from __future__ import annotations

import math

import torch

from ..numerics import integer, nvfp4, ops
from ..numerics.formats import E4M3, Quantized
from .rounding import LearnedRounding

PARAMETER = "scale_offset"  # of a weight quantizer, FP32 [N, K / block]
SUFFIX = f".weight_quantizer.{PARAMETER}"  # of its name in a state dict
SETTING = "learn_scale"  # in QATConfig.training
FORMATS = (*integer.FORMATS, *nvfp4.FORMATS)
_SMALLEST_E4M3 = 2.0 ** (E4M3.emin - E4M3.mantissa_bits)


class LearnedScales(LearnedRounding):
    """`Rounding` with a relative offset of the scales as its one parameter."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, under the learned scales."""
        return self._quantize(weight, dtype, learned, divisor)[0]

    def _quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, learned: tuple[torch.Tensor, ...], divisor: torch.Tensor | None
    ) -> tuple[Quantized, torch.Tensor]:
        """Codes and scales, and the scales of the rule."""
        (offset,), fmt = learned, self.spec.format
        rule_scale, *tensor_scale = super().quantize(weight, dtype, divisor=divisor).scales
        if fmt.tensor_scale is not None and self.spec.rule == "search":
            absmax = ops.quantize(weight, fmt.name, "absmax", dtype, tensor_scale[0]).scales[0]
            rule_scale = _where(_is_fixed(absmax), absmax, rule_scale)
        scale = _moved(rule_scale, offset)
        codes = ops.quantize_to_scale(weight, scale, fmt.name, dtype, *tensor_scale)
        return Quantized(codes, (scale, *tensor_scale)), rule_scale

    def learned_gradients(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        *learned: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The gradient of the offset, FP32 [N, K / block]."""
        (quantized, rule_scale), fmt = self._quantize(weight, dtype, learned, divisor), self.spec.format
        assert fmt.block is not None, fmt.name
        values = ops.dequantize(quantized, fmt.name, torch.float32)
        viewed = weight.to(dtype).float()
        # Not family_of, which torch.compile cannot follow.
        saturates = integer.saturates if fmt.name in integer.FORMATS else nvfp4.saturates
        # s * dv/ds
        slope = torch.where(saturates(viewed, quantized, fmt), values, values - viewed)
        blocks = (grad.float() * slope).unflatten(-1, (grad.shape[-1] // fmt.block, fmt.block)).sum(-1)
        ratio = rule_scale.float() / quantized.scales[0].float()
        ratio = torch.where(_is_fixed(rule_scale), 0.0, ratio)
        return (blocks * ratio / math.sqrt(fmt.block * fmt.element.largest),)


def _moved(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Scales of a rule times 1 + offset, in their own dtype; NaN where either is NaN."""
    product = scale.float() * (1 + offset.bfloat16().float())
    if scale.dtype == E4M3.storage:
        moved = product.clamp(_SMALLEST_E4M3, E4M3.largest).to(scale.dtype)
        return _where(_is_fixed(scale), scale, moved)
    return product.clamp(integer.SMALLEST_SCALE, torch.finfo(scale.dtype).max).to(scale.dtype)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.where` for E4M3, which it does not take."""
    return torch.where(condition, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)


def _is_fixed(scale: torch.Tensor) -> torch.Tensor:
    """Which scales of a rule are not learned: bool, the shape of `scale`."""
    if scale.dtype == E4M3.storage:
        return scale.float() == E4M3.largest
    return torch.zeros_like(scale, dtype=torch.bool)
