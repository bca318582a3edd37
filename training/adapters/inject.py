"""Give a model adapters: PEFT finds the layers and initialises A and B, which then move into the layers themselves.

PEFT wraps each layer into one of its own, which changes the names of all weights and computes W x + s B A x. Here the
layers keep their names and compute with round(W + s B A), see qat/layers/lora.py; what remains of PEFT's is its
configuration, its choice of layers, its initialisations and its files.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.layers.adapted import attach, attach_to_experts
from qat.layers.conv1d import is_conv1d, is_quantconv1d
from qat.layers.experts import layout_of
from qat.layers.lora import FACTORS, NAME, adapters, weight_name
from qat.layers.share import percent

from ..arguments.lora import LoraArguments
from .stacks import from_published
from .targets import ARGUMENT, coverage, resolve_targets

logger = logging.getLogger(__name__)

_ATTRIBUTE = "lora_config"  # of a model with adapters


def lora_config(arguments: LoraArguments) -> LoraConfig:
    """PEFT's configuration of new adapters."""
    return LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=arguments.target_modules,
        init_lora_weights=True if arguments.lora_init == "default" else arguments.lora_init,
        target_parameters=arguments.lora_target_parameters, use_rslora=arguments.use_rslora, task_type="CAUSAL_LM",
    )  # fmt: skip


def config_of(model: nn.Module) -> LoraConfig | None:
    """PEFT's configuration of a model's adapters; None for a model without any."""
    return getattr(model, _ATTRIBUTE, None)


def add_adapters(
    model: PreTrainedModel, config: LoraConfig, seed: int = 42, argument: str = ARGUMENT
) -> PreTrainedModel:
    """Give the layers that `config` names an adapter each, in place, and freeze everything else.

    Args:
        model: quantized or not; its weights may live on the meta device, and A and B do then.
        seed: of the random numbers that A begins with.
        argument: that chose the layers, for messages.

    Returns:
        `model`; `config_of` tells its configuration.

    Raises:
        UserError: `config` names no layer, or one that cannot have such an adapter.
    """
    asked = set(config.target_parameters or ())
    targets = resolve_targets(model, config, argument)
    _check_init(model, config, targets)
    _inject(model, config, seed, argument)
    for name, module in list(model.named_modules()):
        if isinstance(module, ParamWrapper):
            if not name.endswith(".base_layer"):  # that of the parameter that PEFT wrapped before
                _flatten_parameters(model, name, module, asked)
        elif isinstance(module, LoraLayer):
            _flatten(model, name, module)
    _forget_routers(config, asked)
    for attribute in ("peft_config", "peft_type", "active_adapter"):
        vars(model).pop(attribute, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NAME}." in name)
    vars(model)[_ATTRIBUTE] = config
    logger.info(summary(model))
    if warning := coverage(model, _adapted_weights(model))[1]:
        logger.warning(warning)
    return model


def summary(model: nn.Module) -> str:
    """How many layers have adapters, and how many parameters are trained, in one line."""
    found = adapters(model)
    share, _ = coverage(model, _adapted_weights(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return (
        f"adapters in {len(found)} layers with {percent(share)} of the linear weights: {trained:,} parameters are "
        f"trained, {frozen:,} are frozen"
    )


def _adapted_weights(model: nn.Module) -> set[str]:
    return {weight_name(name, module) for name, module in adapters(model).items()}


def _check_init(model: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    """Refuse decompositions that a layer's shape does not have, and PEFT's of GPT-2's transposed weights."""
    if not isinstance(config.init_lora_weights, str):
        return
    for name in targets:
        module, init = model.get_submodule(name), config.init_lora_weights
        if init == "olora" and (is_conv1d(module) or is_quantconv1d(module)):
            raise UserError(
                f"--lora_init olora: {name} is a {type(module).__name__}, whose weight PEFT decomposes without "
                "transposing it; give --lora_init pissa or default"
            )
        if config.r > (smallest := min(module.weight.shape)):
            raise UserError(
                f"--lora_r {config.r} with --lora_init {init}: {name} has rank {smallest} at most; give a smaller "
                "--lora_r, or --lora_init default"
            )


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int, argument: str) -> None:
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta:  # nothing is there to decompose
        config = replace(config, init_lora_weights=True)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise UserError(f"{argument}: {str(error).splitlines()[0]}") from error


def _flatten(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """Put the layer that PEFT has wrapped back in its place, with the adapter in it."""
    base = layer.get_base_layer()
    (own,) = layer.lora_A
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, base)
    attach(base, layer.lora_A[own].weight, layer.lora_B[own].weight, layer.scaling[own], name)


def _flatten_parameters(model: nn.Module, name: str, layer: ParamWrapper, asked: set[str]) -> None:
    """The same of a module whose parameters PEFT has wrapped, one in the other.

    For some families PEFT takes "all-linear" for the router, too, which is not quantized and gets no adapter here.
    """
    base, parent, child = layer.get_base_layer(), *name.rpartition(".")[::2]
    setattr(model.get_submodule(parent), child, base)
    wrapper, inside = layer, name
    while isinstance(wrapper, ParamWrapper):
        if layout_of(base) is not None or any(f"{name}.{wrapper.parameter_name}".endswith(own) for own in asked):
            _attach_parameter(base, wrapper, name).published = inside
        wrapper, inside = wrapper.base_layer, f"{inside}.base_layer"


def _attach_parameter(base: nn.Module, wrapper: ParamWrapper, name: str) -> nn.Module:
    (own,) = wrapper.lora_A
    parameter, layout = wrapper.parameter_name, layout_of(base)
    if layout is not None and parameter in layout.parameters:
        rows = layout.rows(base.get_parameter(parameter))
        if rows.shape[1:] != (wrapper.out_features, wrapper.in_features):
            raise UserError(
                f"--lora_target_parameters: {name}.{parameter} keeps experts transposed, which PEFT does not know of "
                f"{type(base).__name__}; leave it out"
            )
    a, b = (from_published(factor, getattr(wrapper, factor)[own].weight, wrapper.num_experts) for factor in FACTORS)
    return attach_to_experts(base, parameter, a, b, wrapper.scaling[own], name).adapter


def _forget_routers(config: LoraConfig, asked: set[str]) -> None:
    """Let the configuration not name parameters that PEFT has added and that have no adapter; in a fixed order."""
    if config.target_parameters:
        config.target_parameters = sorted(n for n in config.target_parameters if n in asked or not n.endswith("weight"))
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
