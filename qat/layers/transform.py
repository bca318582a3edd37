"""Input transforms: blocks of 32 values of a layer's input are multiplied by a Hadamard matrix before they are rounded.

Values of an MX block share an exponent, so one outlier costs the other 31 their precision. T = S / sqrt(32), where S is
Sylvester's matrix of 1 and -1 and T its own inverse, spreads an outlier over its block (QuIP#, arXiv:2402.04396; blocks
of the MX size: MR-GPTQ, arXiv:2509.23202). With the weight transformed in the same way the product does not change:

    (x T) (W T)^T = x W^T

The parameter stays W: what is saved is the plain model, and the transform is applied before the weight is rounded, each
time. Only quantization sees it; with the quantizers off a layer computes x W^T.

Numerics are those of compressed-tensors, which divides by sqrt(32) behind the product: inputs in FP32, rounded to the
dtype of the input; weights, seen in BF16, in FP64, so that the bits depend neither on the device nor on TF32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import ops
from ..numerics.formats import Quantized
from ..schemes.spec import VIEW_DTYPE
from .rounding import Rounding

SIZE = 32
FORMATS = ("mxfp4", "mxfp8")  # of weights that can be transformed: those in blocks of `SIZE`
DEFAULT_LAYERS = ("*.down_proj", "*.o_proj")
_SLAB_VALUES = 1 << 24  # of a weight that are transformed at a time; bounds the FP64 temporaries
_SIGNS = [[-1 if (row & column).bit_count() % 2 else 1 for column in range(SIZE)] for row in range(SIZE)]
_matrices: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def hadamard(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sylvester's matrix S [32, 32] of 1 and -1, symmetric, S S = 32."""
    key = torch.device(device), dtype
    if (kept := _matrices.get(key)) is not None:
        return kept
    with torch.inference_mode(False):  # autograd keeps it
        made = torch.tensor(_SIGNS, device=device, dtype=dtype)
    if type(made) is torch.Tensor:  # and not one without values, of an estimate of memory
        _matrices[key] = made
    return made


def transformed_input(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] times T, 32 values at a time, in FP32 -> the dtype of x; with a gradient for x."""
    with torch.autocast(x.device.type, enabled=False):
        return _product(x, torch.float32).to(x.dtype)


@torch.no_grad()
def transformed_weight(weight: torch.Tensor, dtype: torch.dtype = VIEW_DTYPE) -> torch.Tensor:
    """A weight [N, K], seen in `dtype`, times T, in FP64 -> `dtype`, without a gradient.

    The values are those of BF16 whatever the dtype: what is packed is the BF16 view.
    """
    slabs = weight.detach().to(dtype).split(max(1, _SLAB_VALUES // weight.shape[-1]))
    found = [_product(slab, torch.float64).to(VIEW_DTYPE).to(dtype) for slab in slabs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _product(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    blocks = x.to(dtype).unflatten(-1, (-1, SIZE)) @ hadamard(x.device, dtype)
    return (blocks / SIZE**0.5).flatten(-2)


@dataclass(frozen=True)
class TransformedRounding(Rounding):
    """The rounding of a weight times T; the values are those of the transformed weight."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, of the transformed weight."""
        return ops.quantize(transformed_weight(weight, dtype), self.spec.format.name, self.spec.rule, dtype)

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, of the transformed weight."""
        return ops.fake_quantize(transformed_weight(weight, dtype), self.spec.format.name, self.spec.rule, dtype)

    def rounded_from(self, weight: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        """See `Rounding.rounded_from`: the transformed weight, seen in BF16, the dtype of all products of rows."""
        return transformed_weight(weight)

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`values`, with a straight-through gradient for the weight."""
        return _Transformed.apply(weight, self, dtype)

    def parameter_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the weight [N, K] from that of the transformed one: times T, which is symmetric."""
        with torch.autocast(grad.device.type, enabled=False):
            return _product(grad, torch.float32).to(grad.dtype)


class _Transformed(torch.autograd.Function):
    """For weights that are wanted by themselves; without a rounding they are transformed and not rounded."""

    @staticmethod
    def forward(ctx, weight, rounding, dtype):
        ctx.rounding, ctx.dtype = rounding, weight.dtype
        return rounding.values(weight, dtype)

    @staticmethod
    def backward(ctx, grad):
        return ctx.rounding.parameter_gradient(grad.to(ctx.dtype)), None, None
