"""Prepare a model as a saved configuration describes it, and put it under other scale rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from ..errors import UserError
from ..schemes.config import QATConfig
from ..schemes.patterns import matches
from . import learned_scales
from .baked_values import NOT_TRAINABLE
from .calibration import set_calibrated_scales
from .left_alone import ANOTHER_KIND
from .prepare import prepare_qat, set_qat_config
from .sites import find_sites, quantized_sites


def prepare_as_saved(
    model: nn.Module,
    config: QATConfig,
    learn_exponent: bool | None = None,
    learn_scale: bool = False,
    keeps_values: bool = False,
) -> nn.Module:
    """`prepare_qat` as `config` describes it, each scheme under the scale rules that it names.

    Args:
        learn_exponent: whether this run trains block exponents, which `model.qat_config` then records; None for no run:
            nothing is trained, and `model.qat_config` is `config`.
        learn_scale: the same for block scales.
        keeps_values: whether the weights are those of a packed checkpoint, which is to be evaluated: layers compute
            with them as they are. Rounded again, they may change: a rule may derive another scale from them.

    Weights that a run with learned scales saved are quantized values, and stay as they are.

    Returns:
        `model`, which is changed; its `qat_config` is set.

    Raises:
        UserError: block scales are to be learned for weights that are quantized values with such scales.
    """
    is_baked = bool(config.training.get(learned_scales.SETTING))
    if is_baked and learn_scale:
        raise UserError(f"{learned_scales.SETTING}=True: {NOT_TRAINABLE}")
    # A pattern that matches nothing is a mistake in a request; in what was saved it is a fact without effect.
    sites = find_sites(model)
    names = [site.name for site in sites]
    left_alone = dict(config.left_alone)
    if config.kinds is not None:
        left_alone |= {site.name: ANOTHER_KIND for site in sites if site.kind not in config.kinds}
    ignore = tuple(pattern for pattern in config.ignore if any(matches(name, pattern) for name in names))
    wanted = {"learn_exponent": bool(learn_exponent), "learn_scale": learn_scale}
    prepare_qat(
        model, config.mapping, ignore, learn_exponent=bool(learn_exponent), scale_rules=config.scale_rules,
        learn_scale=learn_scale, kv_cache_scheme=config.kv_cache_scheme, left_alone=left_alone,
        input_transforms=_transforms_of(config, names),
    )  # fmt: skip
    if is_baked or keeps_values:
        _keep_values(model, None if keeps_values else learned_scales.FORMATS)
    if learn_exponent is None:
        set_qat_config(model, config)
    else:
        wanted[learned_scales.SETTING] |= is_baked
        training: dict[str, str | bool | float] = {name: True for name, on in wanted.items() if on}
        set_qat_config(model, replace(config, training=training))
    if config.calibrated_scales:
        set_calibrated_scales(model, config.calibrated_scales)
    return model


def _transforms_of(config: QATConfig, names: list[str]) -> dict[str, str]:
    """The transforms whose patterns match a layer; see above of patterns that match nothing."""
    return {key: name for key, name in config.input_transforms.items() if any(matches(own, key) for own in names)}


def _keep_values(model: nn.Module, formats: Collection[str] | None) -> None:
    """Let layers with weights in `formats`, default: all, compute with their weights as they are."""
    for site in quantized_sites(model):
        quantizer = site.module.weight_quantizer
        quantizer.is_baked = formats is None or quantizer.spec.format.name in formats


def check_trainable(model: nn.Module) -> None:
    """Raise a UserError if weights of a prepared model hold quantized values that no training must move."""
    for site in quantized_sites(model):
        site.module.weight_quantizer.rounding.check_trainable()


def set_scale_rules(model: nn.Module, rules: Mapping[str, Mapping[str, str | None]]) -> None:
    """Let each layer of a scheme in `rules` quantize its "weight" and its "input" under the rule named there.

    Args:
        rules: as `QATConfig.scale_rules`: {"MXFP4": {"weight": "search", "input": "even"}}; others stay.

    Raises:
        ValueError: a rule that the format does not have.
    """
    for site in quantized_sites(model):
        site.module.set_scheme(site.scheme.with_rules(**rules.get(site.scheme.name, {})))


def set_input_rule(model: nn.Module, rule: str) -> None:
    """Quantize the inputs that are quantized at all under `rule`: what an engine with a rule of its own does.

    Raises:
        UserError: no inputs are quantized, or those of a scheme do not have the rule.
    """
    names = {site.scheme.name for site in quantized_sites(model) if site.scheme.input is not None}
    if not names:
        raise UserError(f"scale rule {rule!r} for inputs has no effect: no layer quantizes its inputs; leave it out")
    set_scale_rules(model, {name: {"input": rule} for name in names})
