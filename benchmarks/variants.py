"""Training steps of one model, BF16 and quantized, that share its parameters and its optimizer.

A layer is changed from one to the other by its class alone: a QuantLinear is an nn.Linear with the same parameters. So
as many decoder layers fit as one model has, and the steps differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.workloads import TrainingStep
from qat.layers.fp8_matmul import linear_products, use_fp8_matmul

BF16 = "BF16"
IN_BF16 = ", products in BF16"  # behind the name of a scheme


class Variants:
    """Steps by name: BF16, the scheme of a prepared model, and the same with products in BF16, if it has others.

    Args:
        model: prepared for `scheme`.
        batch: of the steps.
        compiled: whether steps are compiled, each by itself.
    """

    def __init__(self, model: nn.Module, scheme: str, batch: dict[str, torch.Tensor], compiled: bool = False) -> None:
        self.layers = list(linear_products(model).values())
        self.quantized = [type(layer) for layer in self.layers]
        self.model, self.device = model, batch["input_ids"].device
        self.in_fp8 = bool(use_fp8_matmul(model, "auto", self.device))
        if compiled:  # by default torch 2.11 takes a graph again where only the class of a layer has changed
            torch._dynamo.config.use_recursive_dict_tags_for_guards = False
        self.names = [BF16, scheme, *[scheme + IN_BF16] * self.in_fp8]
        self.step = TrainingStep(model, batch)
        self.steps = {name: self._step(compiled) for name in self.names}

    def _step(self, compiled: bool = False, **options) -> TrainingStep:
        step = TrainingStep(self.model, self.step.batch, compiled, **options)
        step.optimizer = self.step.optimizer
        return step

    def add(self, name: str, **options) -> None:
        """Another step under a name of its own, not compiled; options as `TrainingStep` takes them."""
        self.steps[name] = self._step(**options)

    def run(self, name: str, of: str | None = None) -> Callable[[], None]:
        """A call of a step by name, computed as the variant `of` (default: the name)."""
        return lambda: self._run(name, of or name, evaluate=False)

    def forward(self, name: str) -> Callable[[], None]:
        """A call of the forward pass without gradients."""
        return lambda: self._run(name, name, evaluate=True)

    def _run(self, name: str, of: str, evaluate: bool) -> None:
        self._become(of)
        step = self.steps[name]
        step.evaluate() if evaluate else step()

    def _become(self, name: str) -> None:
        for layer, quantized in zip(self.layers, self.quantized, strict=True):
            layer.__class__ = nn.Linear if name == BF16 else quantized
            layer.in_fp8 = self.in_fp8 and not name.endswith(IN_BF16)
