"""Adapters of experts in fused parameters: as PEFT makes and keeps them, and as layers compute with them.

PEFT's ParamWrapper keeps those of all experts in two matrices. Several parameters of one module have wrappers one in
the other, which is how PEFT's files name them.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from qat.errors import UserError
from qat.layers.adapted import attach_to_experts
from qat.layers.experts import layout_of
from qat.layers.lora import FACTORS, NAME

from .targets import PARAMETERS_ARGUMENT


def as_published(name: str, factor: torch.Tensor) -> torch.Tensor:
    """A or B as PEFT keeps it; of experts A [E, r, K] -> [E * r, K] and B [E, N, r] -> [N, r * E]."""
    if factor.ndim == 2:
        return factor
    return factor.flatten(0, 1) if name.endswith(FACTORS[0]) else factor.permute(1, 2, 0).flatten(1)


def from_published(name: str, factor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `as_published`, contiguous, for a factor of this shape."""
    if len(shape) == 2:
        return factor
    if name.endswith(FACTORS[0]):
        return factor.view(shape)
    experts, rows, rank = shape
    return factor.view(rows, rank, experts).permute(2, 0, 1).contiguous()


def flatten_parameters(model: nn.Module, name: str, layer: ParamWrapper, asked: set[str]) -> None:
    """Put the module whose parameters PEFT has wrapped back in its place, with the adapters in it.

    Args:
        name: of the outermost wrapper.
        asked: the parameters that the user named. PEFT may add those of experts, and the router, where names of layers
            were experts' in older versions of transformers; a router is not quantized and gets no adapter.

    Raises:
        UserError: a parameter that cannot have an adapter.
    """
    base, (parent, _, child) = layer.get_base_layer(), name.rpartition(".")
    setattr(model.get_submodule(parent), child, base)
    wrapper, published = layer, name
    while isinstance(wrapper, ParamWrapper):
        own = f"{name}.{wrapper.parameter_name}"
        if layout_of(base) is not None or any(own == n or own.endswith(f".{n}") for n in asked):
            _attach(base, wrapper, name, published)
        wrapper, published = wrapper.base_layer, f"{published}.base_layer"


def _attach(base: nn.Module, wrapper: ParamWrapper, name: str, published: str) -> None:
    (own,) = wrapper.lora_A
    parameter, layout = wrapper.parameter_name, layout_of(base)
    factors = [getattr(wrapper, factor)[own].weight for factor in FACTORS]
    if layout is not None and parameter in layout.parameters:
        experts, rows, columns = layout.rows(base.get_parameter(parameter)).shape
        if (rows, columns) != (wrapper.out_features, wrapper.in_features):
            raise UserError(
                f"{PARAMETERS_ARGUMENT}: {name}.{parameter} keeps experts transposed, which PEFT does not know of "
                f"{type(base).__name__}; leave it out"
            )
        rank = wrapper.r[own]
        shapes = torch.Size((experts, rank, columns)), torch.Size((experts, rows, rank))
        factors = [from_published(*three) for three in zip(FACTORS, factors, shapes, strict=True)]
    projection = attach_to_experts(base, parameter, *factors, wrapper.scaling[own], name)
    projection.get_submodule(NAME).published = published


def forget_routers(config: LoraConfig, asked: set[str]) -> None:
    """Let a configuration not name parameters that PEFT has added and that have no adapter; in a fixed order."""
    named = config.target_parameters or ()
    config.target_parameters = sorted(n for n in named if n in asked or not n.endswith("weight")) or None
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
