"""Give a model adapters: PEFT finds the layers and initialises A and B, which then move into the layers themselves.

PEFT wraps each layer into one of its own, which changes the names of all weights and computes W x + s B A x. Here the
layers keep their names and compute with round(W + s B A), see qat/layers/lora.py; what remains of PEFT's is its
configuration, its choice of layers, its initialisations and its files.
"""

from __future__ import annotations

import logging
import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.layers.adapted import attach
from qat.layers.lora import adapters
from qat.layers.packed_weight import PackedWeight
from qat.layers.share import linear_weights, percent

from ..arguments.lora import LoraArguments

logger = logging.getLogger(__name__)

_ATTRIBUTE = "lora_config"  # of a model with adapters


def lora_config(arguments: LoraArguments) -> LoraConfig:
    """PEFT's configuration of new adapters."""
    return LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=arguments.target_modules,
        init_lora_weights=True if arguments.lora_init == "default" else arguments.lora_init,
        use_rslora=arguments.use_rslora, task_type="CAUSAL_LM",
    )  # fmt: skip


def config_of(model: nn.Module) -> LoraConfig | None:
    """PEFT's configuration of a model's adapters; None for a model without any."""
    return getattr(model, _ATTRIBUTE, None)


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int = 42) -> PreTrainedModel:
    """Give the layers that `config` names an adapter each, in place, and freeze everything else.

    Args:
        model: quantized or not; its weights may live on the meta device, and A and B do then.
        seed: of the random numbers that A begins with.

    Returns:
        `model`; `config_of` tells its configuration.

    Raises:
        UserError: `config` names no layer, or one that cannot have such an adapter.
    """
    _inject(model, config, seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _flatten(model, name, module)
    for attribute in ("peft_config", "peft_type", "active_adapter"):
        vars(model).pop(attribute, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name)
    vars(model)[_ATTRIBUTE] = config
    logger.info(summary(model))
    return model


def summary(model: nn.Module) -> str:
    """How many layers have adapters, and how many parameters are trained, in one line."""
    found, weights = adapters(model), linear_weights(model)
    covered = sum(weight.numel() for name, weight in weights.items() if name.rpartition(".")[0] in found)
    share = covered / max(1, sum(weight.numel() for weight in weights.values()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    plain = sum(p.numel() for p in model.parameters() if p.is_floating_point()) - trained
    frozen = plain + sum(module.shape.numel() for module in packed)
    return (
        f"adapters in {len(found)} layers with {percent(share)} of the linear weights: {trained:,} parameters are "
        f"trained, {frozen:,} are frozen"
    )


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise UserError(f"--lora_target: {str(error).splitlines()[0]}") from error


def _flatten(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """Put the layer that PEFT has wrapped back in its place, with the adapter in it."""
    base = layer.get_base_layer()
    (own,) = layer.lora_A or ("",)
    if not own:
        raise UserError(f"--lora_target: {name} is a {type(base).__name__}; adapters are for linear layers")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, base)
    attach(base, layer.lora_A[own].weight, layer.lora_B[own].weight, layer.scaling[own], name)
