"""The quantized linear layer as one autograd function that keeps almost nothing for backward.

For y = q(x) q(w)^T with straight-through gradients (Bengio et al., arXiv:1308.3432),

    dw = dy^T q(x)      needs the quantized input only: its codes are saved, 4.25 or 8.25 bits a value, not BF16;
    dx = dy q(w)        needs the quantized weight only: it is computed again from the parameter, which exists anyway.

So a layer saves about a quarter of what nn.Linear saves, and layers that share an input share what is saved. Rounding
is deterministic, so the gradients are those of the plain composition of fake-quantize and linear, bit for bit, except
where inputs are transformed: there q(w) and q(x) are transformed back for these two products, see transform.py. An
input that is not quantized (weight-only schemes) is saved as it is, as nn.Linear does. With a low-rank adapter the
weight is merged before it is rounded, both times, and dw does not exist: see lora.py. A packed weight is given, and
kept, as its codes: see packed_weight.py.

On GPUs that multiply in FP8, forward products of formats whose rounded values E4M3 holds may be computed in it: see
numerics/e4m3_rows.py. The products of the backward pass are in BF16, since gradients are not on a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..numerics.e4m3_rows import Rows
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec
from .input_cache import InputCache
from .lora import MergedRounding
from .rounding import Rounding

_inputs = InputCache()
_unsafe_view = torch.ops.aten._unsafe_view.default


class _Settings(NamedTuple):
    input_spec: TensorSpec | None
    rounding: Rounding
    dtype: torch.dtype
    kept: int  # tensors that are saved of a quantized input: its codes and scales
    divisor: torch.Tensor | None  # of the weight, in formats with a tensor scale
    hadamard: bool = False  # whether the input is transformed
    of_rows: int = 0  # what is given beside the values where the input is E4M3 rows: scale, lost rows and source


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_spec: TensorSpec | None,
    rounding: Rounding,
    dtype: torch.dtype,
    learned: tuple[torch.Tensor, ...] = (),
    divisor: torch.Tensor | None = None,
    input_divisor: torch.Tensor | None = None,
    group: Hashable = None,
    in_fp8: bool = False,
    hadamard: bool = False,
) -> torch.Tensor:
    """x [..., K] and weight [N, K], both rounded to their grids as seen in `dtype` -> [..., N] in `dtype`.

    Gradients reach x, weight, bias and what the rounding of the weight learns, in their own dtypes.

    Args:
        input_spec: None leaves x as it is.
        rounding: of the weight; `learned` are its parameters.
        divisor, input_divisor: of weight and input, FP32 [1], in formats with a tensor scale.
        group: the same for layers that have the same `input_divisor`.
        in_fp8: multiply in FP8 where the rounding gives E4M3 rows; the formats are those of `e4m3_rows`, without a
            tensor scale, and `dtype` is BF16.
        hadamard: x, seen in `dtype`, is transformed; the rounding transforms the weight. See transform.py.
    """
    needs_input = torch.is_grad_enabled() and (weight.requires_grad or any(p.requires_grad for p in learned))
    if torch.is_grad_enabled() and weight.requires_grad:
        rounding.check_trainable()
    kept: list[torch.Tensor] = []
    of_rows: list[torch.Tensor | None] = []
    with torch.no_grad():
        # A compiler casts where the input is made, so that half as many bytes are written and read.
        seen = x.to(dtype) if torch.compiler.is_compiling() and input_spec is not None else x
        if in_fp8:
            assert input_spec is not None
            rows, quantized = _inputs.rows(seen, input_spec, dtype, needs_input, hadamard)
            kept = [] if quantized is None else quantized.tensors
            values, of_rows = rows.values, [rows.scale, rows.lost, None if seen is x else seen]
        else:
            if needs_input and input_spec is not None:
                kept = _inputs.quantized(seen, input_spec, dtype, input_divisor, group, hadamard).tensors
            values = _inputs.values(seen, input_spec, dtype, input_divisor, group, hadamard)
    settings = _Settings(input_spec, rounding, dtype, len(kept), divisor, hadamard, len(of_rows))
    # torch.compile takes no tensor twice.
    return _QuantizedLinear.apply(x, weight, bias, None if values is x else values, settings, *kept, *learned, *of_rows)


def once_for(x: torch.Tensor, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`make()`, called once for the layers that share the input x and `name`."""
    return _inputs.once(x, name, make)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, settings, *tensors):
        tensors, of_rows = _split(tensors, len(tensors) - settings.of_rows)
        kept, learned = _split(tensors, settings.kept)
        values = x if values is None else values
        ctx.settings = settings
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        needs = ctx.needs_input_grad
        needs_values = needs[1] or any(needs[5 + settings.kept :])
        needs_weight = needs[0] or bool(learned)
        kept_for_backward = kept if needs_values else [None] * len(kept)
        plain = None
        if needs_values and settings.input_spec is None:
            plain = _seen(x, settings.dtype) if settings.hadamard else values
        ctx.save_for_backward(weight if needs_weight else None, plain, *kept_for_backward, *learned)
        bias = None if bias is None else bias.to(settings.dtype)
        if of_rows:
            rows = _rows(x, values, of_rows, settings)
            output = ops.rows_product(rows, settings.rounding.rows(weight, settings.dtype, *learned), bias)
            return _unsafe_view(output, (*x.shape[:-1], output.shape[-1]))
        quantized = settings.rounding.values(weight, settings.dtype, *learned, divisor=settings.divisor)
        output = F.linear(values, quantized, bias)
        # A view autograd would not let a model change in place.
        return _unsafe_view(output, output.shape) if torch.compiler.is_compiling() or output._is_view() else output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        settings = ctx.settings
        weight, plain, *tensors = ctx.saved_tensors
        kept, learned = tensors[: settings.kept], tensors[settings.kept :]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        needs_learned = any(needs[5 + settings.kept :])
        grad_rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        learned_grads: tuple[torch.Tensor | None, ...] = (None,) * len(learned)
        if needs[0]:
            rounding, divisor = settings.rounding, settings.divisor
            grad_x = grad_rows @ rounding.values_for_backward(weight, settings.dtype, *learned, divisor=divisor)
            if grad_rows is not grad:
                grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
            grad_x = grad_x.to(x_dtype)
        if needs[1] or needs_learned:
            values = _kept_values(kept, settings) if plain is None else plain
            values = values if values.dim() == 2 else values.reshape(-1, values.shape[-1])
        if needs_learned and isinstance(settings.rounding, MergedRounding):
            learned_grads = settings.rounding.gradients(grad_rows, values, *learned)
            needs_learned = False
        if needs[1] or needs_learned:
            grad_weight = _weight_gradient(grad_rows, values, weight_dtype)
            if needs_learned:
                learned_grads = settings.rounding.learned_gradients(
                    grad_weight, weight, settings.dtype, *learned, divisor=settings.divisor
                )
        if bias_dtype is not None and needs[2]:
            grad_bias = grad_rows.sum(0).to(bias_dtype)
        nothing = [None] * settings.kept, [None] * settings.of_rows
        return grad_x, grad_weight, grad_bias, None, None, *nothing[0], *learned_grads, *nothing[1]


def _seen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`, made once for the layers that share it."""
    return x if x.dtype == dtype else _inputs.once(x, ("seen", dtype), lambda: x.to(dtype))


def _split(tensors: tuple[torch.Tensor, ...], first: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return tensors[:first], tensors[first:]


def _rows(x: torch.Tensor, values: torch.Tensor, others: tuple[torch.Tensor, ...], settings: _Settings) -> Rows:
    """The E4M3 rows of x [..., K] from their tensors."""
    (scale, lost, source), spec = others, settings.input_spec
    assert spec is not None
    source = (x if source is None else source).detach().reshape(values.shape)
    return Rows(values, scale, lost, source, spec.format.name, spec.rule, settings.hadamard)


def _weight_gradient(grad: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad [T, N] transposed times values [T, K] -> [N, K] in the dtype of the weight.

    GPUs write the FP32 sums of a product of BF16 values themselves, with one pass less over the gradient.
    """
    if grad.is_cuda and grad.dtype == values.dtype == torch.bfloat16 and dtype == torch.float32:
        return ops.product_in_fp32(grad.t(), values)
    return (grad.t() @ values).to(dtype)


def _kept_values(kept: list[torch.Tensor], settings: _Settings) -> torch.Tensor:
    """The values of the quantized input that the product was made of; transformed back where it was transformed."""
    assert settings.input_spec is not None
    codes, *scales = kept
    quantized, fmt = Quantized(codes, tuple(scales)), settings.input_spec.format.name
    return ops.dequantize(quantized, fmt, settings.dtype, settings.hadamard)
