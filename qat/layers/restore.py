"""Put the quantizers of a prepared model under other scale rules than those its schemes bring."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..schemes.config import QATConfig
from ..schemes.spec import INPUT_SCALE_RULES, with_scale_rule
from .prepare import prepare_qat
from .quant_linear import is_quantlinear


def prepare_as_saved(model: nn.Module, config: QATConfig) -> nn.Module:
    """`prepare_qat` as `config` describes it, with the scale rules that it names; `model` is changed and returned."""
    prepare_qat(model, config.mapping, config.ignore)
    set_scale_rules(model, config.scale_rules)
    return model


def set_scale_rules(model: nn.Module, rules: dict[str, dict[str, str]]) -> None:
    """Let each layer of a scheme in `rules` quantize its "weight" and its "input" under the rule named there.

    Args:
        rules: as `QATConfig.scale_rules`: {"MXFP4": {"weight": "search", "input": "even"}}; what is not named stays.

    Raises:
        ValueError: an unknown rule.
    """
    for layer in filter(is_quantlinear, model.modules()):
        chosen = rules.get(layer.scheme.name, {})
        weight, input_ = layer.scheme.weight, layer.scheme.input
        weight = with_scale_rule(weight, chosen.get("weight", weight.scale_rule))
        input_ = with_scale_rule(input_, chosen.get("input", input_.scale_rule), INPUT_SCALE_RULES)
        layer.scheme = replace(layer.scheme, weight=weight, input=input_)
        layer.weight_quantizer.spec, layer.input_quantizer.spec = weight, input_


def set_input_rule(model: nn.Module, rule: str) -> None:
    """Quantize the inputs of all layers under `rule`: what an engine with a rule of its own does."""
    schemes = {layer.scheme.name for layer in filter(is_quantlinear, model.modules())}
    set_scale_rules(model, {scheme: {"input": rule} for scheme in schemes})
