"""What produces an activation and can divide it: norms, linear layers, the `up` part of gated experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..layers.experts import ExpertsLayout


@dataclass(frozen=True)
class Producer:
    """What puts out an activation.

    Attributes:
        name: in its model, for messages.
        parameters: that `divide` changes.
        divide: lets what it puts out be divided by factors [channels], of experts [E, channels], in place.
    """

    name: str
    parameters: tuple[torch.Tensor, ...]
    divide: Callable[[torch.Tensor], None]


def is_norm(module: nn.Module) -> bool:
    """A module of its own with one scale per channel and perhaps one offset: LayerNorm, RMSNorm and their kin."""
    parameters = dict(module.named_parameters())
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.ndim == 1 for p in parameters.values())


def norm_producer(name: str, norm: nn.Module) -> Producer:
    """A norm, see `is_norm`."""
    return Producer(name, tuple(norm.parameters()), functools.partial(_divide_norm, norm))


def linear_producer(name: str, linear: nn.Linear) -> Producer:
    """A linear layer."""
    return Producer(name, tuple(linear.parameters(recurse=False)), functools.partial(_divide_linear, linear))


def up_producer(name: str, experts: nn.Module, layout: ExpertsLayout) -> Producer:
    """The `up` part of experts whose gate comes first; factors [E, I]."""
    first = layout.parameters[0]
    weight = experts.get_parameter(first)
    bias = experts.get_parameter(f"{first}_bias") if layout.has_bias else None

    def divide(factors: torch.Tensor) -> None:
        rows = weight.transpose(-2, -1) if layout.is_transposed else weight
        rows[:, factors.shape[-1] :].div_(factors.unsqueeze(-1).to(weight.dtype))
        if bias is not None:
            bias[:, factors.shape[-1] :].div_(factors.to(bias.dtype))

    return Producer(f"{name}.{first}", (weight,) if bias is None else (weight, bias), divide)


def _divide_norm(norm: nn.Module, factors: torch.Tensor) -> None:
    weight, offset = norm.get_parameter("weight"), _weight_offset(norm)
    weight.copy_((weight + offset) / factors - offset)
    _divide_bias(norm, factors)


def _divide_linear(linear: nn.Linear, factors: torch.Tensor) -> None:
    linear.weight.div_(factors[:, None].to(linear.weight.dtype))
    _divide_bias(linear, factors)


def _divide_bias(module: nn.Module, factors: torch.Tensor) -> None:
    bias: torch.Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        bias.div_(factors.to(bias.dtype))


def _weight_offset(norm: nn.Module) -> float:
    """0 where a norm multiplies by its weight, 1 where it multiplies by 1 + weight, as Gemma's do."""
    weight = norm.get_parameter("weight")
    kept = weight.clone()
    x = torch.randn(1, 1, kept.numel(), device=kept.device, dtype=kept.dtype)
    weight.zero_()
    bias: torch.Tensor | None = getattr(norm, "bias", None)
    offset = float((norm(x) - (0 if bias is None else bias)).abs().max() > 0)
    weight.copy_(kept)
    return offset
