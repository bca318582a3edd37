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
from qat.layers.adapted import attach
from qat.layers.conv1d import is_conv1d, is_quantconv1d
from qat.layers.lora import NAME, adapters, weight_name
from qat.layers.packed_weight import PackedWeight
from qat.layers.share import percent
from qat.layers.transformed import transformed_sites

from ..arguments.lora import LoraArguments
from .stacks import flatten_parameters, forget_routers
from .targets import ARGUMENT, PARAMETERS_ARGUMENT, coverage, resolve_targets

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
    if transformed := transformed_sites(model):
        raise UserError(
            f"adapters are added before weights are rounded, and the inputs of {transformed[0].name} are transformed: "
            "train all weights (without --lora_r), or give --input_transform none"
        )
    asked = set(config.target_parameters or ())
    targets = resolve_targets(model, config, argument)
    _check_init(model, config, targets)
    _inject(model, config, seed, argument)
    for name, module in list(model.named_modules()):
        if isinstance(module, ParamWrapper):
            if not name.endswith(".base_layer"):  # that of the parameter that PEFT wrapped before
                flatten_parameters(model, name, module, asked)
        elif isinstance(module, LoraLayer):
            _flatten(model, name, module)
    forget_routers(config, asked)
    _check_complete(model, targets, asked, argument)
    for attribute in ("peft_config", "peft_type", "active_adapter"):
        vars(model).pop(attribute, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NAME}." in name)
    vars(model)[_ATTRIBUTE] = config
    logger.info(summary(model))
    if warning := _coverage(model)[1]:
        logger.warning(warning)
    return model


def summary(model: nn.Module) -> str:
    """How many layers have adapters, and how many parameters are trained, in one line."""
    found, share = adapters(model), _coverage(model)[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    plain = sum(p.numel() for p in model.parameters() if p.is_floating_point()) - trained
    frozen = plain + sum(module.shape.numel() for module in packed)
    return (
        f"adapters in {len(found)} layers with {percent(share)} of the linear weights: {trained:,} parameters are "
        f"trained, {frozen:,} are frozen"
    )


def _coverage(model: nn.Module) -> tuple[float, str]:
    return coverage(model, {weight_name(name, module) for name, module in adapters(model).items()})


def _check_complete(model: nn.Module, targets: list[str], asked: set[str], argument: str) -> None:
    """Refuse layers that PEFT takes for another: in some mixtures, names of layers that were experts' once."""
    if left := [name for name in targets if name not in adapters(model)]:
        raise UserError(
            f"{argument}: PEFT takes {left[0]} for an expert's layer of older versions of transformers and gives it no "
            "adapter; name the layers without it, such as q_proj k_proj v_proj o_proj, and experts in "
            "--lora_target_parameters"
        )
    weights = [f".{weight_name(name, module)}" for name, module in adapters(model).items()]
    if left := sorted(n for n in asked if not any(weight.endswith(f".{n}") for weight in weights)):
        raise UserError(f"{PARAMETERS_ARGUMENT}: PEFT gives {left[0]!r} no adapter; leave it out")


def _check_init(model: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    """Refuse decompositions that a layer's shape does not have, and PEFT's of GPT-2's transposed weights."""
    if not isinstance(config.init_lora_weights, str):
        return
    if config.target_parameters:
        raise UserError(
            f"--lora_init {config.init_lora_weights} is for linear layers; beside --lora_target_parameters "
            f"{' '.join(sorted(config.target_parameters))}, give --lora_init default"
        )
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
