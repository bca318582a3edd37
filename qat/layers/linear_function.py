"""The quantized linear layer as one autograd function that keeps almost nothing for backward.

For y = q(x) q(w)^T with straight-through gradients (Bengio et al., arXiv:1308.3432),

    dw = dy^T q(x)      needs the quantized input only: its codes are saved, 4.25 or 8.25 bits a value, not BF16;
    dx = dy q(w)        needs the quantized weight only: it is computed again from the parameter, which exists anyway.

So a layer saves about a quarter of what nn.Linear saves, and layers that share an input share what is saved. Rounding
is deterministic, so the gradients are those of the plain composition of fake-quantize and linear, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..schemes.spec import TensorSpec
from . import learned_scales as gradients
from .input_cache import InputCache

_inputs = InputCache()


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_spec: TensorSpec,
    weight_spec: TensorSpec,
    dtype: torch.dtype,
    exponent_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] and weight [N, K], both rounded to their grids as seen in `dtype` -> [..., N] in `dtype`.

    Gradients reach x, weight, bias and the learned offset of the weight's exponents (FP32 [N, K / 32]), if there is
    one, in their own dtypes.
    """
    learns_exponent = exponent_offset is not None and exponent_offset.requires_grad
    keeps_codes = torch.is_grad_enabled() and (weight.requires_grad or learns_exponent)
    with torch.no_grad():
        packed, scale = _inputs.codes(x, input_spec, dtype) if keeps_codes else (None, None)
        values = _inputs.values(x, input_spec, dtype)
    return _QuantizedLinear.apply(
        x, weight, bias, exponent_offset, values, packed, scale, input_spec, weight_spec, dtype
    )


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offset, values, packed, scale, input_spec, weight_spec, dtype):
        ctx.specs = input_spec, weight_spec, dtype
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(
            weight if needs_x or offset is not None else None,
            offset,
            packed if needs_weight else None,
            scale if needs_weight else None,
        )
        quantized = gradients.fake_quantize_weight(weight, weight_spec, dtype, offset)
        return F.linear(values, quantized, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, offset, packed, scale = ctx.saved_tensors
        input_spec, weight_spec, dtype = ctx.specs
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ gradients.fake_quantize_weight(weight, weight_spec, dtype, offset)
            grad_x = grad_x.reshape(*grad.shape[:-1], -1).to(x_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            values = ops.dequantize(packed, scale, input_spec.format_name, dtype)
            grad_weight = grad_rows.t() @ values.reshape(-1, values.shape[-1])
            if offset is not None:
                grad_offset = gradients.exponent_gradient(grad_weight, weight, offset, weight_spec, dtype)
            grad_weight = grad_weight.to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_offset, *[None] * 6
