"""Input transforms: blocks of 32 values of a layer's input are multiplied by a Hadamard matrix before they are rounded.

Values of an MX block share an exponent, so one outlier costs the other 31 their precision. T = S / sqrt(32), where S is
Sylvester's matrix of 1 and -1 and T its own inverse, spreads an outlier over its block (QuIP#, arXiv:2402.04396; blocks
of the MX size: MR-GPTQ, arXiv:2509.23202). With the weight transformed in the same way the product does not change:

    (x T) (W T)^T = x W^T

The parameter stays W: what is saved is the plain model, and the transform is applied before the weight is rounded, each
time. Only quantization sees it; with the quantizers off a layer computes x W^T.

Both are computed in FP32, see numerics/hadamard.py: inputs are rounded to their dtype; weights, seen in BF16, to BF16.
Up to the order of sums, which seldom matters, the numerics of inputs are compressed-tensors'.

In the backward pass of y = q(x T) q(W T)^T the quantized operands are transformed, not the gradients, since T T = 1:

    dx = dy (q(W T) T),    dW = dy^T (q(x T) T)

The operands are computed there anyway, from the parameter and from the codes, and the kernels that do it transform them
before they write; gradients would take a pass of their own. The operands are rounded to the dtype of the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import ops
from ..numerics.e4m3_rows import Rows
from ..numerics.formats import Quantized
from ..schemes.spec import VIEW_DTYPE
from .baked_values import BakedValues
from .rounding import Rounding

FORMATS = ("mxfp4", "mxfp8")  # of weights that can be transformed: those in blocks of `SIZE`


def transformed_input(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] times T, 32 values at a time, in FP32 -> the dtype of x; with a gradient for x."""
    return ops.transform(x, x.dtype)


@torch.no_grad()
def transformed_weight(weight: torch.Tensor, dtype: torch.dtype = VIEW_DTYPE) -> torch.Tensor:
    """A weight [N, K], seen in `dtype`, times T, in FP32 -> `dtype`, without a gradient.

    The values are those of BF16 whatever the dtype: what is packed is the BF16 view.
    """
    return ops.transform(weight.detach(), dtype).to(VIEW_DTYPE).to(dtype)


@dataclass(frozen=True)
class TransformedRounding(Rounding):
    """The rounding of a weight times T; the values are those of the transformed weight."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, of the transformed weight."""
        return ops.quantize(*self._given(weight, dtype))

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, of the transformed weight."""
        return ops.fake_quantize(*self._given(weight, dtype))

    def values_for_backward(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Rounding.values_for_backward`: `values` times T, which are near the weight itself."""
        return ops.fake_quantize(*self._given(weight, dtype), True)

    def _given(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple:
        """Arguments of `ops`: seen in BF16 a weight is transformed where it is rounded."""
        at_once = dtype == VIEW_DTYPE
        weight = weight.detach() if at_once else transformed_weight(weight, dtype)
        return weight, self.spec.format.name, self.spec.rule, dtype, None, at_once

    def rows(self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor) -> Rows:
        """See `Rounding.rows`; `dtype` is BF16, that of all products of rows."""
        weight, fmt, rule, dtype, _, at_once = self._given(weight, dtype)
        return ops.to_rows(weight, fmt, rule, dtype, False, at_once)[0]

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`values`, with a straight-through gradient for the weight."""
        return _Transformed.apply(weight, self, dtype)


class BakedTransformed(BakedValues):
    """The rounding of a weight that holds the quantized values of a transformed one, as packed folders do.

    There is no plain weight to go back to, so a layer transforms its input with the quantizers off, too.
    """

    def values_for_backward(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Rounding.values_for_backward`: the values times T."""
        return ops.transform(self.values(weight, dtype), dtype)


class _Transformed(torch.autograd.Function):
    """For weights that are wanted by themselves; without a rounding they are transformed and not rounded."""

    @staticmethod
    def forward(ctx, weight, rounding, dtype):
        ctx.dtype = weight.dtype
        return rounding.values(weight, dtype)

    @staticmethod
    def backward(ctx, grad):
        return ops.transform(grad, ctx.dtype), None, None  # T is symmetric
