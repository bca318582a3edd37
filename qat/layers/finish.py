"""Bake learned exponents into the weights, so that a saved checkpoint needs no tensor that others would not know.

A baked weight is the quantized one that the forward pass computed with: a multiple of a power of two, exact in BF16.
Rounding it again must give it back, whatever exponents it was made with, and under the rule RCEIL it does: RCEIL takes
the finest scale under which a block's maximum does not saturate, so the learned scale or a finer one, on whose grid all
values of the block lie as well. (FLOOR may read a maximum of 240 as 480 of the next finer scale, which saturates at
448.) Hence a baked checkpoint is plain: Hugging Face names, exact export by the usual code, and a `qat_config.json`
that names RCEIL as the rule of its weights.

Checkpoints from which training resumes are not baked: they hold FP32 masters and the offsets themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..numerics import ops
from ..schemes.config import QATConfig
from . import learned_scales as gradients
from .names import original_name
from .quant_linear import is_quantlinear

OFFSET_SUFFIX = ".weight_quantizer.exponent_offset"
BAKED_RULE = "rceil"
_VIEW_DTYPE = torch.bfloat16  # that of the forward pass under autocast, and of export


@torch.no_grad()
def bake_exponents(
    model: nn.Module, state_dict: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """`state_dict` of `model` with each weight whose exponents were learned replaced by its quantized values.

    Args:
        model: the prepared model; only its schemes are read.
        state_dict: complete tensors by the model's names; those of offsets do not come back.
        dtypes: the dtypes that weights are going to be saved in; they are rounded to these before they are quantized.

    Returns:
        A new dict; baked weights have the dtype they had before. Without learned exponents, `state_dict` as it was.
    """
    offsets = [name for name in state_dict if name.endswith(OFFSET_SUFFIX)]
    if not offsets:
        return state_dict
    schemes = {original_name(name): module.scheme for name, module in model.named_modules() if is_quantlinear(module)}
    result = {name: tensor for name, tensor in state_dict.items() if name not in offsets}
    for name in offsets:
        layer = name.removesuffix(OFFSET_SUFFIX)
        weight, spec = result[f"{layer}.weight"], schemes[layer].weight
        viewed = weight.to(dtypes.get(f"{layer}.weight", weight.dtype))
        codes = gradients.quantize(viewed, spec, _VIEW_DTYPE, state_dict[name])
        result[f"{layer}.weight"] = ops.dequantize(*codes, spec.format_name, weight.dtype)
    return result


def baked_config(config: QATConfig) -> QATConfig:
    """The configuration to save beside baked weights."""
    if not config.training.get("learn_exponent"):
        return config
    rules = {name: {**rule, "weight": BAKED_RULE} for name, rule in config.scale_rules.items()}
    return replace(config, scale_rules=rules)


def check_baked(names: Iterable[str], folder: str | Path) -> None:
    """Raise a ValueError if a checkpoint with tensors of these names still needs its learned exponents."""
    if any(name.endswith(OFFSET_SUFFIX) for name in names):
        raise ValueError(
            f"{folder} is a checkpoint to resume from: its block exponents are learned and lie beside FP32 masters. "
            "Resume the run (--resume_from_checkpoint), or use the folder that the finished run saved"
        )


def check_compute_dtype(bf16: bool) -> None:
    """Raises ValueError unless a run that learns exponents computes in BF16."""
    if not bf16:
        raise ValueError(
            "--learn_exponent True: weights are saved as they are quantized in bfloat16, which is not what --bf16 "
            "False or --fp16 True trains; give --bf16 True, or leave --learn_exponent out"
        )
