"""Whether a model still computes what it computed: its logits, and in mixtures of experts the scores of its routers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..layers.experts import layout_of

Choice = tuple[torch.Tensor, torch.Tensor]  # a router's: the experts of each token, and their weights, both [T, k]


class Equality:
    """How far what a model computes for a batch has moved since this was made.

    Rounding alone sends a token to another expert where two of its scores are almost equal, and its logits move, and
    with them those of all later tokens. So experts are given the choice that their router made at first, and what the
    router chooses now is compared by itself: its largest scores, which hardly change where two almost equal experts
    swap. There the median token counts.

    Args:
        model: in evaluation mode, computing in FP32.
        batch: what it is called with.
    """

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        layouts = {module: layout for module in model.modules() if (layout := layout_of(module)) is not None}
        self.routed = [module for module, layout in layouts.items() if layout.is_routed]
        self.is_scored_before = len(self.routed) < len(layouts)  # inputs of experts have the router's scores already
        self.choices: dict[nn.Module, list[Choice]] = {module: [] for module in self.routed}
        self.router_moved = 0.0
        self.before = self._logits(self._record)

    def moved(self) -> float:
        """The largest change of a token's logits or of a router's scores, as a fraction of the largest of them."""
        self.router_moved = 0.0
        again = {module: iter(choices) for module, choices in self.choices.items()}

        def replay(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x, _, weights = (*args, *kwargs.values())
            index, expected = next(again[module])
            change = (weights.sort(-1).values - expected.sort(-1).values).abs().amax(-1)
            self.router_moved = max(self.router_moved, float(change.median() / expected.abs().max()))
            return (x, index, expected), {}

        change = (self._logits(replay) - self.before).abs().amax(-1).flatten()
        largest = change.median() if self.is_scored_before else change.max()
        return max(float(largest / self.before.abs().max()), self.router_moved)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, index, weights = (*args, *kwargs.values())
        self.choices[module].append((index, weights))

    def _logits(self, hook: Callable) -> torch.Tensor:
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self.routed]
        try:
            return self.model(**self.batch).logits
        finally:
            for handle in handles:
                handle.remove()
