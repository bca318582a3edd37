"""Models on fake tensors: the real modules, whose parameters have shapes and dtypes and no memory.

Fake tensors are those of the CPU, since autocast knows no meta device, and a CPU build of PyTorch no other one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.layers.adapted import attach
from qat.layers.calibration import calibrated_layers
from qat.layers.conv1d import is_conv1d, is_quantconv1d
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.kv_cache import cache_quantizers
from qat.layers.lora import NAME, adapters

from ..arguments.lora import ALL_LINEAR
from .plan import Plan

_UNMASKED = "sdpa_unmasked"  # transformers makes a mask for fake tensors, since it cannot see that none is needed
_LOCAL = "sdpa_local"  # the same, but for sliding windows
_MEMORY_OF_SDPA = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def copy_of(skeleton: PreTrainedModel) -> PreTrainedModel:
    """A copy of a skeleton that computes as a loaded model does."""
    model = copy.deepcopy(skeleton)
    model.config.use_cache = False
    compute_in_autocast_dtype(model)
    for quantizer in cache_quantizers(model):
        quantizer.scale = 1.0
    return model


def give_fake_tensors(model: PreTrainedModel, mode: FakeTensorMode, dtype: torch.dtype) -> PreTrainedModel:
    """Let a model's parameters on the meta device become fake tensors in `dtype`, in place; adapters stay FP32.

    `mode` is in force.
    """
    factors = {id(p) for layer in adapters(model).values() for p in layer.get_submodule(NAME).parameters()}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        keeps = not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or id(tensor) in factors
        return torch.empty_like(tensor, dtype=tensor.dtype if keeps else dtype, device="cpu")

    model._apply(fake)
    model.tie_weights()
    for layer in calibrated_layers(model).values():
        layer.input_quantizer.divisor = torch.ones(1)
    return model


def set_attention(model: PreTrainedModel, plan: Plan) -> None:
    """Let attention take as much memory as on the device of the run: fused, with a mask or without one.

    Without one, layers with a sliding window have one in `sdpa`, as packed_attention.py leaves it to them; and a model
    that takes no other attention keeps that of packed rows.
    """
    own = model.config._attn_implementation
    if own not in _MEMORY_OF_SDPA:
        return
    for name in (_UNMASKED, _LOCAL):
        AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(_UNMASKED, lambda *args, **kwargs: None)
    AttentionMaskInterface.register(_LOCAL, _local_mask)
    masked = plan.masked or (plan.packed and not model._can_set_attn_implementation())
    chosen = _UNMASKED if own != "sdpa" else own if masked else _LOCAL
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        config._attn_implementation = chosen


def _local_mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask of a sliding window that is shorter than the row; else none."""
    window = kwargs.get("local_size")
    return None if window is None or kwargs["kv_length"] <= window else sdpa_mask(*args, **kwargs)


def set_checkpointing(model: PreTrainedModel, plan: Plan) -> None:
    """Let decoder layers be computed again in the backward pass, as the plan says.

    The state of the generator is not kept: that of a CPU is a tensor with values.
    """
    if not (plan.checkpoints and model.supports_gradient_checkpointing):
        return
    options = {"use_reentrant": False, **dict(plan.checkpointing or ()), "preserve_rng_state": False}
    options.pop("offload", None)  # see `Estimate`
    own = {name: options.pop(name) for name in ("every_n_layers",) if name in options}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options, **own)


def with_adapters(skeleton: PreTrainedModel, rank: int, target: str) -> PreTrainedModel:
    """A copy of a skeleton whose layers have adapters, everything else being frozen.

    Args:
        target: "all-linear", which leaves out the head, ends of names with commas between them, or a regular expression
            over whole names.
    """
    model = copy.deepcopy(skeleton)
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if layer is head or not (isinstance(layer, nn.Linear) or is_conv1d(layer) or is_quantconv1d(layer)):
            continue
        if not _is_target(name, target):
            continue
        rows, columns = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
        factors = (torch.empty(shape, device="meta") for shape in ((rank, columns), (rows, rank)))
        attach(layer, *factors, 1.0, name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NAME}." in name)
    return model


def _is_target(name: str, target: str) -> bool:
    ends = target.split(",")
    return (
        target == ALL_LINEAR
        or name.split(".")[-1] in ends
        or name.endswith(tuple(f".{end}" for end in ends))
        or (len(ends) == 1 and re.fullmatch(target, name) is not None)
    )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, which FSDP gathers one by one; [] where the model does not name their class."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """Those of all modules."""
    for module in modules:
        yield from module.parameters()
