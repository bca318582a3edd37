"""What a finished run saves: plain weights under Hugging Face's names, and the configuration that describes them.

Whatever a layer trains beside its weight goes into the weight here. Checkpoints to resume from are not finished.
"""

from __future__ import annotations

import torch
from torch import nn

from ..schemes.config import QATConfig
from . import learned_scales
from .names import original_name
from .sites import quantized_sites

OWN_SUFFIXES = (learned_scales.SUFFIX,)  # of parameters that no plain checkpoint has


def finished_weights(
    model: nn.Module, state_dict: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The state dict to save of a model; `state_dict` itself where layers train nothing beside their weights.

    Args:
        model: the prepared model; only its specs are read.
        state_dict: complete tensors by the model's names.
        dtypes: the dtypes that tensors are going to be saved in, by name.
    """
    specs = {original_name(site.name): site.module.weight_quantizer.spec for site in quantized_sites(model)}
    return learned_scales.bake(state_dict, specs, dtypes)


def finished_config(config: QATConfig) -> QATConfig:
    """The configuration to save beside finished weights."""
    return learned_scales.baked_config(config)
