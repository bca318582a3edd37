"""The products of all experts of a layer as one autograd function that keeps almost nothing for backward.

The rows of all tokens, sorted by expert, are multiplied by the weights of their experts in one grouped product, as
transformers' `grouped_mm` path does. What is kept is what `linear_function.py` keeps: the codes of the input, once a
token however many experts read it, and the weight parameter, which is rounded again in the backward pass. Without a
rounding (BF16 training, quantizers that are off) the same function casts the weight in place of rounding it.

Rounded weights exist for one product at a time, and for as many experts at a time as `CHUNK_BYTES` holds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec
from .lora import MergedRounding
from .rounding import Rounding

CHUNK_BYTES = 4 << 30  # of rounded weights: more experts than these hold are computed one part after the other
_ALIGNED_BYTES = 16  # which the rows of operands of torch.nn.functional.grouped_mm must start at


@dataclass(frozen=True)
class Routing:
    """Which rows go to which expert. T tokens with k experts each make S = T * k rows, sorted by expert.

    Attributes:
        experts: the expert of each row, int64 [S].
        tokens: the token of each row, int64 [S]; None where each row is a token of its own.
        inverse: the row of each pair of token and expert, int64 [S], tokens outside; None likewise.
        offsets: the end of each expert's rows, int32 [E].
    """

    experts: torch.Tensor
    tokens: torch.Tensor | None
    inverse: torch.Tensor | None
    offsets: torch.Tensor

    @classmethod
    def of(cls, top_k_index: torch.Tensor, experts: int) -> tuple[Routing, torch.Tensor]:
        """The routing of a router's choice [T, k], and the order that sorts its pairs, int64 [S]."""
        ids, order = torch.sort(top_k_index.reshape(-1))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        offsets = torch.searchsorted(ids, every, right=True, out_int32=True)
        return cls(ids, order // top_k_index.shape[-1], inverse, offsets), order

    @classmethod
    def even(cls, rows: int, experts: int, device: torch.device) -> Routing:
        """The routing of rows that are sorted by expert already, as many for each."""
        assert rows % experts == 0, f"{rows} rows are not as many for each of {experts} experts"
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
        ids = torch.arange(experts, device=device).repeat_interleave(rows // experts)
        return cls(ids, None, None, ends)


@dataclass(frozen=True)
class _Settings:
    input_spec: TensorSpec | None
    rounding: Rounding | None
    dtype: torch.dtype
    kept: int  # tensors that are saved of a quantized input: its codes and scales
    divisors: torch.Tensor | None  # of the weights of each expert, in formats with a tensor scale
    is_transposed: bool


def grouped_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    dtype: torch.dtype,
    input_spec: TensorSpec | None = None,
    rounding: Rounding | None = None,
    learned: tuple[torch.Tensor, ...] = (),
    divisors: torch.Tensor | None = None,
    input_divisor: torch.Tensor | None = None,
    is_transposed: bool = False,
    gather: bool = False,
) -> torch.Tensor:
    """Each row of x times the weight of its expert, both rounded to their grids as seen in `dtype`: [S, N] in `dtype`.

    Gradients reach x, weight and what the rounding of the weight learns, in their own dtypes.

    Args:
        x: [S, K], rows sorted by expert; with `gather` [T, K], a row for each token.
        weight: of all experts, [E, N, K]; [E, K, N] if `is_transposed`.
        input_spec: None leaves x as it is.
        rounding: of the weights; None casts them. `learned` are its parameters.
        divisors: of the weights, FP32 [E], in formats with a tensor scale.
        input_divisor: of x, FP32 [1], likewise.
    """
    needs_input = torch.is_grad_enabled() and (weight.requires_grad or any(p.requires_grad for p in learned))
    if rounding is not None and torch.is_grad_enabled() and weight.requires_grad:
        rounding.check_trainable()
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        if input_spec is None:
            values = x.to(dtype)
        elif needs_input:
            quantized = ops.quantize(x, input_spec.format.name, input_spec.rule, dtype, input_divisor)
            kept, values = quantized.tensors, ops.dequantize(quantized, input_spec.format.name, dtype)
        else:
            values = ops.fake_quantize(x, input_spec.format.name, input_spec.rule, dtype, input_divisor)
    settings = _Settings(input_spec, rounding, dtype, len(kept), divisors, is_transposed)
    tokens, inverse = (routing.tokens, routing.inverse) if gather else (None, None)
    # torch.compile takes no tensor twice.
    return _GroupedProduct.apply(
        x, weight, None if values is x else values, settings, tokens, inverse, routing.offsets, *kept, *learned
    )


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, values, settings, tokens, inverse, offsets, *tensors):
        kept, learned = tensors[: settings.kept], tensors[settings.kept :]
        values = x if values is None else values
        ctx.settings = settings
        ctx.dtypes = x.dtype, weight.dtype
        needs_values = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[7 + settings.kept :])
        needs_weight = ctx.needs_input_grad[0] or bool(learned)
        kept_for_backward = kept if needs_values else [None] * len(kept)
        plain = values if needs_values and settings.input_spec is None else None
        ctx.shape = weight.shape if settings.rounding is None else settings.rounding.shape_of(weight)
        ctx.tokens = x.shape[0]
        ctx.save_for_backward(
            weight if needs_weight else None, plain, tokens, inverse, offsets, *kept_for_backward, *learned
        )
        rows = values if tokens is None else values[tokens]
        outputs = []
        for part in _parts(ctx.shape, settings, offsets):
            rounded = _rounded(weight, learned, settings, part)
            outputs.append(_grouped_mm(rows[part.rows], rounded.transpose(1, 2), part.offsets))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        settings = ctx.settings
        weight, plain, tokens, inverse, offsets, *tensors = ctx.saved_tensors
        grad = grad.contiguous()  # that of a sum is one number, expanded
        kept, learned = tensors[: settings.kept], tensors[settings.kept :]
        x_dtype, weight_dtype = ctx.dtypes
        needs_learned = any(ctx.needs_input_grad[7 + settings.kept :])
        parts = _parts(ctx.shape, settings, offsets)
        grad_x = grad_weight = None
        learned_grads: tuple[torch.Tensor | None, ...] = (None,) * len(learned)
        if ctx.needs_input_grad[0]:
            each = [_grouped_mm(grad[p.rows], _rounded(weight, learned, settings, p), p.offsets) for p in parts]
            grad_x = each[0] if len(each) == 1 else torch.cat(each)
            if inverse is not None:  # the sum over a token's experts, in an order that does not change
                each_token = ctx.tokens, inverse.numel() // max(ctx.tokens, 1), grad_x.shape[-1]
                grad_x = grad_x[inverse].view(each_token).sum(1, dtype=torch.float32)
            grad_x = grad_x.to(x_dtype)
        if ctx.needs_input_grad[1] or needs_learned:
            values = _kept_values(kept, settings) if plain is None else plain
            rows = values if tokens is None else values[tokens]
        if needs_learned and isinstance(settings.rounding, MergedRounding):
            factors, packed = learned[:2], learned[2:]
            learned_grads = _factor_gradients(grad, rows, factors, settings.rounding.scaling, offsets)
            learned_grads = (*learned_grads, *[None] * len(packed))
            needs_learned = False
        if ctx.needs_input_grad[1] or needs_learned:
            grad_weight = grad.new_empty(ctx.shape, dtype=weight_dtype)
            for part in parts:
                a, b = (rows, grad) if settings.is_transposed else (grad, rows)
                grad_weight[part.experts] = _grouped_mm(a[part.rows].t(), b[part.rows], part.offsets)
            if needs_learned:
                learned_grads = _learned_gradients(grad_weight, weight, learned, settings)
        return grad_x, grad_weight, *[None] * 5, *[None] * settings.kept, *learned_grads


@dataclass(frozen=True)
class _Part:
    """Experts whose weights are rounded together, and their rows.

    Attributes:
        offsets: the ends of their rows, counted from the first of these, int32.
    """

    experts: slice
    rows: slice
    offsets: torch.Tensor


def _parts(shape: torch.Size, settings: _Settings, offsets: torch.Tensor) -> list[_Part]:
    """The experts of weights of this shape, as many at a time as `CHUNK_BYTES` holds rounded."""
    experts, *matrix = shape
    bytes_each = matrix[0] * matrix[1] * settings.dtype.itemsize
    step = max(1, CHUNK_BYTES // bytes_each)
    if step >= experts:
        return [_Part(slice(None), slice(None), offsets)]
    ends = [0, *offsets.tolist()]
    parts = []
    for first in range(0, experts, step):
        last = min(first + step, experts)
        own = slice(first, last)
        parts.append(_Part(own, slice(ends[first], ends[last]), offsets[own] - ends[first]))
    return parts


def _rounded(
    weight: torch.Tensor, learned: tuple[torch.Tensor, ...] | list[torch.Tensor], settings: _Settings, part: _Part
) -> torch.Tensor:
    """The rounded weights of some experts, [E, N, K]; in memory as the parameter is, so that products are the same."""
    own = weight[part.experts]
    if settings.rounding is None:
        own = own.to(settings.dtype)
        return own.transpose(1, 2) if settings.is_transposed else own
    is_row = settings.rounding.is_packed or not settings.is_transposed
    rows = own if is_row else own.transpose(1, 2).contiguous()
    divisors = None if settings.divisors is None else settings.divisors[part.experts]
    values = settings.rounding.values(rows, settings.dtype, *(p[part.experts] for p in learned), divisor=divisors)
    return values.transpose(1, 2).contiguous().transpose(1, 2) if settings.is_transposed else values


def _learned_gradients(
    grad: torch.Tensor, weight: torch.Tensor, learned: list[torch.Tensor], settings: _Settings
) -> tuple[torch.Tensor, ...]:
    assert settings.rounding is not None
    if settings.is_transposed:
        grad, weight = grad.transpose(1, 2).contiguous(), weight.transpose(1, 2).contiguous()
    return settings.rounding.learned_gradients(grad, weight, settings.dtype, *learned, divisor=settings.divisors)


def _factor_gradients(
    grad: torch.Tensor, rows: torch.Tensor, factors: list[torch.Tensor], scaling: float, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of A [E, r, K] and B [E, N, r] from the gradient [S, N] of the product of rows [S, K]; see lora.py."""
    a, b = (factor.to(grad.dtype) for factor in factors)
    grad_a = _grouped_mm(_grouped_mm(grad, b, offsets).t(), rows, offsets)
    grad_b = _grouped_mm(grad.t(), _grouped_mm(rows, a.transpose(1, 2), offsets), offsets)
    return grad_a.to(factors[0].dtype) * scaling, grad_b.to(factors[1].dtype) * scaling


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[S, K] times [E, K, N] -> [S, N], rows by expert; or [M, S] times [S, N] -> [E, M, N], columns by expert."""
    strides = [stride * a.itemsize for operand in (a, b) for stride in operand.stride() if stride != 1]
    if any(stride % _ALIGNED_BYTES for stride in strides):
        return _one_by_one(a, b, offsets)
    return F.grouped_mm(a, b, offs=offsets)


def _one_by_one(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same, a product for each expert."""
    own = [slice(first, last) for first, last in itertools.pairwise([0, *offsets.tolist()])]
    if b.ndim == 3:
        return torch.cat([a[rows] @ matrix for rows, matrix in zip(own, b, strict=True)])
    return torch.stack([a[:, columns] @ b[columns] for columns in own])


def _kept_values(kept: list[torch.Tensor], settings: _Settings) -> torch.Tensor:
    """The values of the quantized input that the product was made of."""
    assert settings.input_spec is not None
    codes, *scales = kept
    return ops.dequantize(Quantized(codes, tuple(scales)), settings.input_spec.format.name, settings.dtype)
