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
from .experts import ExpertProjection
from .learned import SUFFIXES
from .names import original_name
from .operands import Operands
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
    sites = {original_name(site.quantizer_name): site for site in quantized_sites(model)}
    tensors = {site.module: original_name(site.tensor) for site in sites.values()}
    result = {name: tensor for name, tensor in state_dict.items() if name not in offsets}

    def viewed(module: Operands) -> torch.Tensor:
        name = tensors[module]
        return state_dict[name].to(dtypes.get(name, state_dict[name].dtype))

    for name, offset in offsets.items():
        module = sites[next(name.removesuffix(suffix) for suffix in OWN_SUFFIXES if name.endswith(suffix))].module
        values = _baked(module, offset, viewed).to(state_dict[tensors[module]].dtype)
        result[tensors[module]] = module.from_rows(values).contiguous()
    return result


def _baked(module: Operands, offset: torch.Tensor, viewed: Callable[[Operands], torch.Tensor]) -> torch.Tensor:
    """The quantized values of a weight as the forward pass computed with them, [..., N, K]."""
    rounding, fmt = module.weight_quantizer.rounding, module.weight_quantizer.spec.format
    rows = module.rows(viewed(module)).contiguous()
    divisor = None
    if isinstance(module, ExpertProjection):
        divisor = module.divisors(rows, VIEW_DTYPE)
    elif fmt.tensor_scale is not None:
        divisor = ops.tensor_divisor([viewed(other) for other in module.fused_with], fmt.name, VIEW_DTYPE)
    return rounding.values(rows, VIEW_DTYPE, offset, divisor=divisor)


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
