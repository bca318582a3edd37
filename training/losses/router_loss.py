"""RouterLoss: the load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, section 2.2).

A model whose config.json says `"output_router_logits": true` adds it to its own loss. Losses in chunks leave the
model's own loss out, so it is computed here, by transformers' own function and from the model's own router logits.

It is a mean over the tokens of a forward pass, so it is averaged over processes and accumulated batches. transformers
sums it over these: there `router_aux_loss_coef` grows with the number of processes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qat.errors import UserError

_FUNCTION = "load_balancing_loss_func"  # of each module of transformers that has such a model
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
NAME = "aux_loss"  # in the log, as in transformers' outputs


class UnknownRouterLoss(UserError):
    """A model's config asks for the loss of its routers, which is not computed in the way that is known here."""


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of one model.

    Attributes:
        function: transformers' own.
        experts: of a layer. chosen: for each token.
        factor: of the loss in the whole loss.
    """

    function: Callable[..., torch.Tensor]
    experts: int
    chosen: int
    factor: float

    @torch.compiler.disable  # the compiler cannot follow the function
    def __call__(
        self, router_logits: tuple[torch.Tensor, ...] | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Scalar, without the factor.

        Args:
            router_logits: [batch * time, experts] of each layer.
            attention_mask: of the batch, [batch, time]; None where no token is padding.
        """
        assert router_logits, "the model gives no router logits"
        return self.function(router_logits, self.experts, self.chosen, attention_mask)


def wants_router_loss(model: nn.Module) -> bool:
    """Whether the model has a config that asks for the loss of routers."""
    return bool(getattr(_text_config(model), "output_router_logits", False))


def find_router_loss(model: nn.Module) -> RouterLoss | None:
    """The loss that a model adds to its own, as its config says; None where it adds none.

    Raises:
        UnknownRouterLoss: the config asks for it, and the model computes it in another way.
    """
    if not wants_router_loss(model):
        return None
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    text = _text_config(model)
    names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    values = [getattr(model, name, getattr(text, name, None)) for name in names]
    if function is None or None in values or [*inspect.signature(function).parameters] != _PARAMETERS:
        raise UnknownRouterLoss(
            f'config.json says "output_router_logits": true, and no load-balancing loss is known of a '
            f'{type(model).__name__}; set "output_router_logits": false in it to train without one'
        )
    return RouterLoss(function, *values)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config
