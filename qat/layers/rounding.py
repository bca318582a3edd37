"""Rounding: how a weight gets its quantized values, and what its gradient passes on to parameters of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..numerics.e4m3_rows import Rows
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec


@dataclass(frozen=True)
class Rounding:
    """Round to the format of the spec, with straight-through gradients and no parameters of its own.

    Subclasses learn something along with the weight: `learned` are their parameters. Formats with a tensor scale take
    its `divisor`, FP32 [1].
    """

    spec: TensorSpec
    is_packed = False  # whether a weight is given as its codes, see packed_weight.py

    @property
    def gives_rows(self) -> bool:
        """Whether the rule alone decides about the values, so that `rows` gives them as E4M3 rows."""
        return True

    def shape_of(self, weight: torch.Tensor) -> torch.Size:
        """The shape of the weight that `weight` stands for."""
        return weight.shape

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """Codes and scales of a weight [N, K], seen in `dtype`."""
        return ops.quantize(weight, self.spec.format.name, self.spec.rule, dtype, divisor)

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The quantized values [N, K] in `dtype`, without a gradient."""
        return ops.fake_quantize(weight, self.spec.format.name, self.spec.rule, dtype, divisor)

    def values_for_backward(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the gradient of the product is multiplied by to give that of the input: [N, K] in `dtype`."""
        return self.values(weight, dtype, *learned, divisor=divisor)

    def rounded_from(self, weight: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        """What the rule rounds, [N, K], without a gradient; where `gives_rows`."""
        return weight.detach()

    def rows(self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor) -> Rows:
        """The quantized values as E4M3 rows; where `gives_rows`."""
        source = self.rounded_from(weight, *learned)
        return ops.to_rows(source, self.spec.format.name, self.spec.rule, dtype)[0]

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`values`, with gradients for the weight and what is learned."""
        return ops.fake_quantize(weight, self.spec.format.name, self.spec.rule, dtype, divisor)

    def learned_gradients(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        *learned: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of `learned` from that of the quantized values [N, K]."""
        return ()

    def check_trainable(self) -> None:
        """Raise a UserError where a weight under this rounding must not be trained."""


class LearnedRounding(Rounding):
    """A rounding with parameters: subclasses define `quantize` and `learned_gradients`."""

    @property
    def gives_rows(self) -> bool:
        """See `Rounding.gives_rows`."""
        return False

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, under the learned scales."""
        return ops.dequantize(self.quantize(weight, dtype, *learned, divisor=divisor), self.spec.format.name, dtype)

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`values`, with gradients for the weight and the parameters."""
        return _FakeQuantize.apply(weight, self, dtype, divisor, *learned)


class _FakeQuantize(torch.autograd.Function):
    """For quantizers that are called by themselves, outside of the fused linear function."""

    @staticmethod
    def forward(ctx, weight, rounding, dtype, divisor, *learned):
        ctx.settings = rounding, dtype, divisor
        ctx.save_for_backward(weight, *learned)
        return rounding.values(weight, dtype, *learned, divisor=divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight, *learned), (rounding, dtype, divisor) = ctx.saved_tensors, ctx.settings
        gradients = rounding.learned_gradients(grad, weight, dtype, *learned, divisor=divisor)
        return grad.to(weight.dtype), None, None, None, *gradients
