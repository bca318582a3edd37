"""What a finished run saves: plain weights under Hugging Face's names, and the configuration that describes them.

Whatever a layer trains beside its weight goes into the weight here: what is saved is *baked*, the quantized values that
the forward pass computed with, as BF16 holds them. So a checkpoint needs no tensor that others would not know.

* With learned exponents, rounding the values again under RCEIL gives them back (`learned_exponents.py`): the
  configuration names that rule.
* With learned scales no rule does: layers compute with the values as they are, and an export finds the scales again
  (`baked_values.py`). The setting `learn_scale` of the configuration says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..numerics import ops
from ..schemes.config import QATConfig
from ..schemes.presets import get_scheme
from ..schemes.spec import VIEW_DTYPE
from . import learned_exponents
from .learned import SUFFIXES
from .names import original_name
from .quant_linear import QuantLinear
from .sites import quantized_sites

OWN_SUFFIXES = SUFFIXES  # of parameters that no plain checkpoint has


@torch.no_grad()
def finished_weights(
    model: nn.Module, state_dict: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The state dict to save of a model; `state_dict` itself where layers train nothing beside their weights.

    Args:
        model: the prepared model; only its specs are read, and which layers share a divisor.
        state_dict: complete tensors by the model's names.
        dtypes: the dtypes that tensors are going to be saved in, by name; weights are rounded to these before they are
            quantized.

    Returns:
        A new dict without offsets; baked weights have the dtype they had before.
    """
    offsets = {name: tensor for name, tensor in state_dict.items() if name.endswith(OWN_SUFFIXES)}
    if not offsets:
        return state_dict
    layers = {original_name(site.name): site.module for site in quantized_sites(model)}
    names = {layer: name for name, layer in layers.items()}
    result = {name: tensor for name, tensor in state_dict.items() if name not in offsets}

    def viewed(layer: str) -> torch.Tensor:
        name = f"{layer}.weight"
        return state_dict[name].to(dtypes.get(name, state_dict[name].dtype))

    for name, offset in offsets.items():
        layer = next(name.removesuffix(suffix) for suffix in OWN_SUFFIXES if name.endswith(suffix))
        divisor = _divisor(layers[layer], names, viewed)
        rounding = layers[layer].weight_quantizer.rounding
        values = rounding.values(viewed(layer), VIEW_DTYPE, offset, divisor=divisor)
        result[f"{layer}.weight"] = values.to(state_dict[f"{layer}.weight"].dtype)
    return result


def _divisor(
    layer: QuantLinear, names: dict[QuantLinear, str], viewed: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """The divisor that the layer's weight had in the forward pass; None in formats without a tensor scale."""
    fmt = layer.weight_quantizer.spec.format
    if fmt.tensor_scale is None:
        return None
    return ops.tensor_divisor([viewed(names[other]) for other in layer.fused_with], fmt.name, VIEW_DTYPE)


def finished_config(config: QATConfig) -> QATConfig:
    """The configuration to save beside finished weights."""
    if not config.training.get(learned_exponents.SETTING):
        return config
    rules = {
        name: {**rule, "weight": learned_exponents.BAKED_RULE} if _is_learned(name) else rule
        for name, rule in config.scale_rules.items()
    }
    return replace(config, scale_rules=rules)


def _is_learned(scheme: str) -> bool:
    """Whether weights of a scheme have exponents to learn."""
    return get_scheme(scheme).weight.format.name in learned_exponents.FORMATS
