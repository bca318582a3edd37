"""The gradient of a model's head, summed in FP32 over parts of the tokens.

A head is vocabulary x hidden numbers, so each pass over a sum of that size counts: 0.5 GB at 32,000 x 4,096. Autograd
gives each part's gradient in the dtype of the product, converts it to that of the parameter and has it added, 18 bytes
a number under autocast. Where a head is a matrix and nothing else, the product itself adds its FP32 result to the sum
on a GPU: 8 bytes a number, 4 for the first part, and no other tensor of that size. A part's gradient is then not
rounded to BF16 before it is added.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .distillation import chunks

logger = logging.getLogger(__name__)

_ROWS = 4096  # of a weight whose gradient exists in BF16 at a time, where products cannot write FP32


class GradientSums:
    """Sums of the gradients of `parameters` over parts, in FP32 at least; `head` is what parts are given to."""

    reads_inputs = False  # whether `head` adds to the sums only where its inputs need gradients

    def __init__(self, parameters: list[torch.Tensor], head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.parameters, self._head = parameters, head
        self._totals: list[torch.Tensor] | None = None

    def head(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of a part, differentiable."""
        return self._head(inputs)

    @property
    def differentiated(self) -> list[torch.Tensor]:
        """What autograd is asked for the gradients of, which `add` takes."""
        return self.parameters

    def add(self, gradients: list[torch.Tensor]) -> None:
        """Those of one part; the sum may take their memory."""
        if self._totals is None:
            shared = len(gradients) > 1 or not all(g.is_contiguous() for g in gradients)  # two may be one tensor
            pairs = zip(gradients, self.parameters, strict=True)
            self._totals = [
                g.to(_at_least_fp32(p), copy=shared, memory_format=torch.contiguous_format) for g, p in pairs
            ]
            return
        for total, gradient in zip(self._totals, gradients, strict=True):
            total.add_(gradient)

    def take(self) -> list[torch.Tensor]:
        """The sums, in the dtypes of the parameters; zeros if there was no part."""
        totals = [torch.zeros_like(p) for p in self.parameters] if self._totals is None else self._totals
        self._totals = None
        return [total.to(p.dtype) for total, p in zip(totals, self.parameters, strict=True)]


class MatrixHead:
    """A head whose logits are transformed(hidden @ weight^T).

    Args:
        weight: [V, H].
        transformed: of [n, V], differentiable.
    """

    def __init__(self, weight: torch.Tensor, transformed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.weight, self.transformed = weight, transformed


class MatrixSum(GradientSums):
    """The sum of a MatrixHead's gradient, to which the products themselves add.

    Args:
        needed: whether the gradient of the weight is wanted.
    """

    def __init__(self, matrix: MatrixHead, needed: bool) -> None:
        super().__init__([matrix.weight] * needed, matrix.transformed)
        self.reads_inputs, self.wide = needed, _at_least_fp32(matrix.weight)
        device = matrix.weight.device.type
        is_cast = torch.is_autocast_enabled(device) and matrix.weight.dtype != torch.float64
        self.seen = matrix.weight.detach().to(torch.get_autocast_dtype(device) if is_cast else matrix.weight.dtype)

    def head(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of a part, from its hidden states [n, H]."""
        return self._head(_Product.apply(inputs, self))

    @property
    def differentiated(self) -> list[torch.Tensor]:
        """Nothing: `head` adds to the sum in its backward pass."""
        return []

    def add(self, gradients: list[torch.Tensor]) -> None:
        """Nothing is left to add."""

    def add_product(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add grad^T hidden, of grad [n, V] and hidden [n, H] in one dtype."""
        left, is_first = grad.t(), self._totals is None
        if is_first:
            self._totals = [hidden.new_empty(left.shape[0], hidden.shape[1], dtype=self.wide)]
        (total,) = self._totals
        if hidden.dtype == self.wide:
            torch.mm(left, hidden, out=total) if is_first else total.addmm_(left, hidden)
        elif self.wide != torch.float32 or not writes_fp32(hidden.device, hidden.dtype):
            for rows in chunks(len(total), _ROWS):
                product = left[rows] @ hidden
                total[rows].copy_(product) if is_first else total[rows].add_(product)
        else:
            _product_to(total, left, hidden, is_first)


def _product_to(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, is_first: bool) -> None:
    """left @ right of BF16 or FP16 into FP32 `total`, or added to it."""
    if is_first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@functools.cache
def writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype`, BF16 or FP16, can be written in FP32, or added to it; tried once on a device.

    Only PyTorch's CUDA backend has such products, and not under every setting: ROCm's raise, and so do those that
    PYTORCH_TUNABLEOP_ENABLED tunes. Where there are none, this is logged.
    """
    if device.type != "cuda":
        return False
    refusal = why_not_fp32(device, dtype)
    if refusal is not None:
        logger.info("The gradient of the head is added up apart from its products: %s", refusal)
    return refusal is None


@torch.no_grad()
def why_not_fp32(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products cannot be written in FP32; None if two small ones give a sum that neither BF16 nor FP16 holds."""
    length = 2**11 + 1
    left, right = (torch.ones(length, width, dtype=dtype, device=device) for width in (32, 16))
    total = torch.empty(32, 16, device=device, dtype=torch.float32)
    try:
        for is_first in (True, False):
            _product_to(total, left.t(), right, is_first)
    except RuntimeError as error:
        return str(error)
    return None if bool((total == 2 * length).all()) else "they are rounded before they are written"


class _Product(torch.autograd.Function):
    """hidden [n, H] @ weight^T -> [n, V]; the backward pass adds to a MatrixSum."""

    @staticmethod
    def forward(ctx, hidden, sums):
        ctx.sums, ctx.dtype = sums, hidden.dtype
        seen = hidden.to(sums.seen.dtype)
        ctx.save_for_backward(seen)
        return seen @ sums.seen.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (seen,), sums = ctx.saved_tensors, ctx.sums
        if sums.parameters:
            sums.add_product(grad, seen)
        return (grad @ sums.seen).to(ctx.dtype), None


def is_matrix(module: nn.Module, forward: Callable) -> bool:
    """Whether a head whose `forward` this is multiplies with a weight that is whole, and does nothing else."""
    if type(module) is not nn.Linear or getattr(forward, "__func__", None) is not nn.Linear.forward:
        return False
    return module.bias is None and type(module.weight) in (torch.Tensor, nn.Parameter)


def _at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
