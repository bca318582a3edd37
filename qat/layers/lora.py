"""Low-rank adapters (LoRA, arXiv:2106.09685) that are merged before the weight is rounded.

The weight W of a layer stays frozen in its stored dtype; A [r, K] and B [N, r] are trained in FP32. The product is
computed with the rounded merged weight, round(W + s B A), which is the weight that a finished run saves and packs: what
is served is what was trained. With straight-through gradients (arXiv:1308.3432) and q(x) for the rounded input,

    dA = s B^T dW = s (dy B)^T q(x)        dB = s dW A^T = s dy^T (q(x) A^T)

so no gradient of W's size exists, and backward costs what it costs in LoRA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..numerics import ops
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec
from .rounding import LearnedRounding

NAME = "adapter"  # of the submodule of an adapted layer
FACTORS = ("lora_A", "lora_B")
_START = ("start_A", "start_B")


class LowRankAdapter(nn.Module):
    """What is added to the weight of a layer, as a product of two factors.

    Args:
        lora_a: A, FP32 [..., r, K]; lora_b: B, FP32 [..., N, r].
        scaling: s, the factor of the product.

    Attributes:
        start_A, start_B: those of the model that a run started from; None where B was zero there.
        is_at_start: whether those are added in place of the trained ones.
        published: the name of the layer in PEFT's files, where it has another one there.
    """

    lora_A: nn.Parameter  # as PEFT and the paper name it
    lora_B: nn.Parameter
    start_A: torch.Tensor | None
    start_B: torch.Tensor | None

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = (nn.Parameter(factor.detach().float()) for factor in (lora_a, lora_b))
        self.scaling = ctypes.c_float(scaling).value  # as kernels take it
        self.is_at_start = False
        self.published = ""
        for name in _START:
            self.register_buffer(name, None, persistent=False)

    def remember_start(self) -> None:
        """Let what is added now be what `at_start` computes with."""
        for name, factor in zip(_START, (self.lora_A, self.lora_B), strict=True):
            setattr(self, name, factor.detach().clone())

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        if self.is_at_start and self.start_A is not None and self.start_B is not None:
            return self.start_A, self.start_B
        return self.lora_A, self.lora_B

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"r={self.lora_A.shape[-2]}, scaling={self.scaling:g}"


def adapter_of(module: nn.Module) -> LowRankAdapter | None:
    """The adapter of a layer that computes with one now; None without one, and while nothing is added."""
    adapter = module._modules.get(NAME)
    if not isinstance(adapter, LowRankAdapter) or (adapter.is_at_start and adapter.start_A is None):
        return None
    return adapter


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m._modules.get(NAME), LowRankAdapter)}


def weight_name(name: str, module: nn.Module) -> str:
    """The name of the weight that an adapter of the module with this name is added to."""
    parameter = getattr(module, "parameter", None)  # of experts, whose module has the weight
    return f"{name}.weight" if parameter is None else f"{name.removesuffix(f'.projections.{parameter}')}.{parameter}"


@contextmanager
def adapters_at_start(model: nn.Module) -> Iterator[None]:
    """Let a model compute with its adapters as they were when the run started, which often means without any."""
    found = [adapter for adapter in model.modules() if isinstance(adapter, LowRankAdapter)]
    for adapter in found:
        adapter.is_at_start = True
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_at_start = False


@dataclass(frozen=True)
class MergedRounding(LearnedRounding):
    """A rounding of the merged weight, whose learned parameters are A and B.

    Args:
        spec: None for a weight that is not quantized: the merged one is used as it is.
        scaling: of the product.
    """

    spec: TensorSpec | None  # type: ignore[assignment]  # that of Rounding is always there
    scaling: float

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, of the merged weight."""
        a, b = learned
        if self.spec is None:
            return ops.merge(weight, a, b, self.scaling).to(dtype)
        return ops.fake_quantize_merged(
            weight, a, b, self.scaling, self.spec.format.name, self.spec.rule, dtype, divisor
        )

    @property
    def gives_rows(self) -> bool:
        """See `Rounding.gives_rows`."""
        return self.spec is not None

    def rounded_from(self, weight: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        """See `Rounding.rounded_from`: the merged weight."""
        return ops.merge(weight.detach(), *learned, self.scaling)

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, of the merged weight."""
        assert self.spec is not None
        merged = ops.merge(weight, *learned, self.scaling)
        return ops.quantize(merged, self.spec.format.name, self.spec.rule, dtype, divisor)

    def gradients(
        self, grad: torch.Tensor, values: torch.Tensor, *learned: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Those of A and B.

        Args:
            grad: of the output, [T, N].
            values: of the quantized input, [T, K].
        """
        a, b = learned
        grad_a = (grad @ b.to(grad.dtype)).t() @ values
        grad_b = grad.t() @ (values @ a.to(values.dtype).t())
        return grad_a.to(a.dtype) * self.scaling, grad_b.to(b.dtype) * self.scaling

    def learned_gradients(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        *learned: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Those of A and B from the gradient of the weight [..., N, K]."""
        a, b = learned
        grad = grad.float()
        return b.transpose(-2, -1) @ grad * self.scaling, grad @ a.transpose(-2, -1) * self.scaling


class _Merge(torch.autograd.Function):
    """W + s B A with gradients for A and B, where a weight is wanted by itself."""

    @staticmethod
    def forward(ctx, weight, a, b, scaling):
        ctx.rounding = MergedRounding(None, scaling)
        ctx.save_for_backward(a, b)
        return ops.merge(weight, a, b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_weight = grad if ctx.needs_input_grad[0] else None
        return grad_weight, *ctx.rounding.learned_gradients(grad, grad, grad.dtype, a, b), None


def merged(weight: torch.Tensor, adapter: LowRankAdapter) -> torch.Tensor:
    """A weight [..., N, K] with its adapter's product added, in its own dtype."""
    return _Merge.apply(weight, *adapter.factors, adapter.scaling)


def weight_with_adapter(layer: Any) -> torch.Tensor:
    """The weight of a layer in the layout of its parameter; with an adapter, the merged one.

    Args:
        layer: with `weight`, `rows` and `from_rows`, see `Operands`.
    """
    adapter = adapter_of(layer)
    return layer.weight if adapter is None else layer.from_rows(merged(layer.rows(layer.weight), adapter))
