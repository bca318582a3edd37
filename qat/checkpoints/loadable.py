"""Loadable: whether transformers can load a packed folder that is good, told from its model and config.json alone.

Some folders are what vLLM reads, and transformers' own loader stops at them. Each cause is looked for where it lies:

* `_init_weights` of some models reads the weight of a linear layer, which packed layers do not have.
* Experts that are packed one by one reach transformers' fused parameters through a converter of the model, and through
  `CompressedTensorsDequantize`, which knows one scheme for all experts, and not all formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from ..layers.sites import EXPERTS, LINEAR, quantized_sites
from .stored_names import StoredNames
from .targets import experts_modules

_EXPERTS = "experts"


def why_not_loadable(model: PreTrainedModel, names: StoredNames, config: Mapping[str, Any]) -> str | None:
    """Why transformers cannot load the packed model; None where no reason is known.

    Args:
        model: prepared; on the meta device.
        names: of its source.
        config: the quantization_config.
    """
    if (reason := _init_weights_fails(model)) is not None:
        return reason
    return None


def runs_as_linear(module: nn.Module, quant_method: str) -> bool:
    """Whether transformers replaces an experts module by linear layers, one set for each expert, when it is packed."""
    classes = [base.__name__ for base in type(module).__mro__]
    patched = [MODULES_TO_PATCH_FOR_QUANTIZATION[name] for name in classes if name in MODULES_TO_PATCH_FOR_QUANTIZATION]
    return any(quant_method in entry["quantization_methods"] for entry in patched)


@torch.no_grad()
def _init_weights_fails(model: PreTrainedModel) -> str | None:
    """What fails when transformers initializes the modules of the packed model, which it does with each one."""
    layers = [site.owner for site in quantized_sites(model) if site.kind == LINEAR.name]
    weights = {layer: layer._parameters.pop("weight") for layer in layers}
    try:
        with torch.random.fork_rng(devices=[]):
            for parent in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
                pass
    finally:
        for layer, weight in weights.items():
            layer._parameters["weight"] = weight
    return None
