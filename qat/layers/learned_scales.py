"""Learned exponents of weights, whose scales are stored: the exponent of a block is what the scale rule says plus a
trained offset, rounded to an integer.

As in LSQ (Esser et al., arXiv:1902.08153) rounding passes gradients straight through, also that of the offset; with
v = 2^e q(w / 2^e)

    dv/de = ln 2 * (v - w), or ln 2 * v where w saturates,

summed over the block and multiplied by 1 / sqrt(32 * max_normal), LSQ's gradient scale. (AutoRound tunes a factor on
the block's maximum, before the rule takes its logarithm; an offset of the exponent is the logarithm of such a factor.)
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..numerics.formats import BLOCK_SIZE, E8M0_NAN, get_format
from ..numerics.mx import saturates
from ..schemes.spec import TensorSpec


def fake_quantize(
    x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, exponent_offset: torch.Tensor | None = None
) -> torch.Tensor:
    """`ops.fake_quantize`, with a learned offset where there is one."""
    if exponent_offset is None:
        return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
    return _FakeQuantize.apply(x, exponent_offset, spec, dtype)


def fake_quantize_weight(
    weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, exponent_offset: torch.Tensor | None = None
) -> torch.Tensor:
    """The values of `fake_quantize`, without a gradient."""
    if exponent_offset is None:
        return ops.fake_quantize(weight, spec.format_name, spec.scale_rule, dtype)
    return ops.dequantize(*quantize(weight, spec, dtype, exponent_offset), spec.format_name, dtype)


def quantize(
    x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, exponent_offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.quantize` by `spec`, with exponents moved by a learned offset (FP32 [..., K / 32]) where there is one."""
    packed, scale = ops.quantize(x, spec.format_name, spec.scale_rule, dtype)
    if exponent_offset is None:
        return packed, scale
    moved = (scale.int() + exponent_offset.round().int()).clamp(0, E8M0_NAN - 1).to(torch.uint8)
    scale = torch.where((scale == E8M0_NAN) | exponent_offset.isnan(), E8M0_NAN, moved)
    return ops.quantize_to_scale(x, scale, spec.format_name, dtype), scale


def exponent_gradient(
    grad: torch.Tensor, weight: torch.Tensor, exponent_offset: torch.Tensor, spec: TensorSpec, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of a quantized weight [N, K] -> that of its exponent offset, FP32 [N, K / 32].

    Args:
        weight: [N, K], seen in `dtype` when it was quantized.
    """
    packed, scale = quantize(weight, spec, dtype, exponent_offset)
    fmt = get_format(spec.format_name)
    values = ops.dequantize(packed, scale, spec.format_name, torch.float32)
    viewed = weight.to(dtype).float()
    slope = torch.where(saturates(viewed, scale, fmt), values, values - viewed)
    blocks = (grad.float() * slope).unflatten(-1, (grad.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))
    return blocks.sum(-1) * (math.log(2) / math.sqrt(BLOCK_SIZE * fmt.max_normal))


class _FakeQuantize(torch.autograd.Function):
    """For layers outside of the fused function."""

    @staticmethod
    def forward(ctx, x, exponent_offset, spec, dtype):
        ctx.settings = spec, dtype
        ctx.save_for_backward(x, exponent_offset)
        return fake_quantize_weight(x, spec, dtype, exponent_offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, exponent_offset = ctx.saved_tensors
        return grad.to(x.dtype), exponent_gradient(grad, x, exponent_offset, *ctx.settings), None, None
