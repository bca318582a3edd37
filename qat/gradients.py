"""How gradients pass a quantizer, beyond the plain straight-through estimator of ops.py.

*Clipped* straight-through: a value whose magnitude exceeds its block's largest element comes out as that element
whatever it is exactly, so its gradient is zero; all others pass. Only one bit a value is kept for that.

*Learned exponents* (for weights, whose scales are stored): the exponent of a block is what the scale rule says plus a
trained offset, rounded to an integer. As in LSQ (Esser et al., arXiv:1902.08153) rounding passes gradients straight
through, also that of the offset; with v = 2^e q(w / 2^e)

    dv/de = ln 2 * (v - w), or ln 2 * v where w saturates,

summed over the block and multiplied by 1 / sqrt(32 * max_normal), LSQ's gradient scale. (AutoRound tunes a factor on
the block's maximum, before the rule takes its logarithm; an offset of the exponent is the logarithm of such a factor.)
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from . import ops
from .formats import BLOCK_SIZE, E8M0_NAN, get_format
from .reference import unpack_mask
from .schemes import TensorSpec


def fake_quantize(
    x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, exponent_offset: torch.Tensor | None = None
) -> torch.Tensor:
    """`ops.fake_quantize` with the gradient estimator of `spec` and, where there is one, a learned offset."""
    if exponent_offset is None and not spec.clips_gradients:
        return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
    return _FakeQuantize.apply(x, exponent_offset, spec, dtype)


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


def clip(grad: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`grad` [..., K] with zeros where the bits of `mask` (uint8 [..., K / 8]) are set."""
    return grad.masked_fill(unpack_mask(mask), 0.0)


def weight_gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor],
    spec: TensorSpec,
    dtype: torch.dtype,
    learns_exponent: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of a quantized weight -> those of the weight and of its exponent offset.

    Args:
        grad: [N, K], with respect to the quantized values.
        weight: [N, K], seen in `dtype` when it was quantized.
        codes: packed codes and scales of `weight`.
        learns_exponent: whether there is an offset; its gradient is FP32 [N, K / 32].
    """
    clips = spec.gradient_estimator == "clipped_ste" if learns_exponent else spec.clips_gradients
    if not (clips or learns_exponent):
        return grad, None
    mask = ops.saturation_mask(weight, codes[1], spec.format_name, dtype)
    offset_grad = _exponent_gradient(grad, weight, codes, mask, spec, dtype) if learns_exponent else None
    return clip(grad, mask) if clips else grad, offset_grad


def _exponent_gradient(grad, weight, codes, mask, spec, dtype):
    values = ops.dequantize(*codes, spec.format_name, torch.float32)
    slope = torch.where(unpack_mask(mask), values, values - weight.to(dtype).float())
    blocks = (grad.float() * slope).unflatten(-1, (grad.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))
    return blocks.sum(-1) * (math.log(2) / math.sqrt(BLOCK_SIZE * get_format(spec.format_name).max_normal))


class _FakeQuantize(torch.autograd.Function):
    """For layers outside of the fused function; keeps the input itself only where an offset learns from it."""

    @staticmethod
    def forward(ctx, x, exponent_offset, spec, dtype):
        codes = quantize(x, spec, dtype, exponent_offset)
        ctx.learns_exponent = exponent_offset is not None
        ctx.settings = spec, dtype, x.dtype
        if ctx.learns_exponent:
            ctx.save_for_backward(x, *codes)
        else:
            ctx.save_for_backward(ops.saturation_mask(x, codes[1], spec.format_name, dtype))
        return ops.dequantize(*codes, spec.format_name, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        spec, dtype, x_dtype = ctx.settings
        if not ctx.learns_exponent:
            return clip(grad, *ctx.saved_tensors).to(x_dtype), None, None, None
        x, *codes = ctx.saved_tensors
        grad_x, grad_offset = weight_gradients(grad, x, tuple(codes), spec, dtype, learns_exponent=True)
        return grad_x.to(x_dtype), grad_offset, None, None
