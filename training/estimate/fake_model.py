"""Models on fake tensors: the real modules, whose parameters have shapes and dtypes and no memory.

Fake tensors are those of the CPU, since autocast knows no meta device, and a CPU build of PyTorch no other one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qat.layers.calibration import calibrated_layers
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.kv_cache import cache_quantizers

from .plan import Plan

_UNMASKED = "sdpa_unmasked"  # transformers makes a mask for fake tensors, since it cannot see that none is needed
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
    """Let a model's parameters on the meta device become fake tensors in `dtype`, in place. `mode` is in force."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=wanted, device="cpu")

    model._apply(fake)
    model.tie_weights()
    for layer in calibrated_layers(model).values():
        layer.input_quantizer.divisor = torch.ones(1)
    return model


def set_attention(model: PreTrainedModel, masked: bool) -> None:
    """Let attention take as much memory as on the device of the run: fused, with a mask or without one."""
    if model.config._attn_implementation not in _MEMORY_OF_SDPA:
        return
    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(_UNMASKED, lambda *args, **kwargs: None)
    masked = masked and model.config._attn_implementation == "sdpa"
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        config._attn_implementation = "sdpa" if masked else _UNMASKED


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


def adapted(model: nn.Module, target: str) -> dict[str, nn.Linear]:
    """The linear layers that get adapters: all but the head, or those whose names end in one of a list."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if target == "all-linear":
        return layers
    ends = tuple(target.split(","))
    return {n: m for n, m in layers.items() if n.split(".")[-1] in ends or n.endswith(ends)}


def freeze_base(model: nn.Module, target: str) -> None:
    """Let only the weights with adapters need gradients.

    An adapter keeps of its layer's input what training the weight would keep, and takes the memory of a weight while it
    is merged and of a gradient while its own are computed. So the weight stands for it here.
    """
    model.requires_grad_(False)
    for layer in adapted(model, target).values():
        layer.weight.requires_grad_(True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, which FSDP gathers one by one; [] where the model does not name their class."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """Those of all modules."""
    for module in modules:
        yield from module.parameters()
