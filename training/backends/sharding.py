"""What FSDP needs so that training on many devices is the training on one.

accelerate's `mixed_precision: bf16` would gather parameters, reduce gradients, keep rotary frequencies and return the
loss in BF16. The single process does none of this: it computes linear layers in BF16 (autocast) and everything else in
FP32. So here parameters are gathered as they are, autocast does the rest, and gradients are summed in FP32; only the
order of sums is left to differ. `--fsdp_gather_dtype bfloat16` gathers BF16, half the traffic, for a residual stream,
norms and embeddings in BF16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from qat.errors import UserError
from qat.layers.names import original_name

from .weightless import first_process_loads, waits_for_weights


def set_precision(plugin, gather_dtype: str = "float32") -> None:
    """Let accelerate's FSDP `plugin` gather parameters in `gather_dtype` and reduce gradients in FP32.

    Raises:
        UserError: FSDP1 without `fsdp_use_orig_params`, whose flat parameters would all get the same weight decay.
    """
    if plugin.fsdp_version == 1 and not plugin.use_orig_params:
        raise UserError(
            "fsdp_use_orig_params: false flattens weights, norms and biases into one parameter, so that weight decay "
            "cannot tell them apart; set fsdp_use_orig_params: true in the accelerate configuration"
        )
    gathered = None if gather_dtype == "float32" else getattr(torch, gather_dtype)
    if plugin.fsdp_version == 1:  # buffers (rotary frequencies) stay as they are
        plugin.mixed_precision_policy = MixedPrecision(param_dtype=gathered, reduce_dtype=torch.float32)
    else:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def keep_dtypes(accelerator: Accelerator) -> None:
    """Let FSDP2 shard parameters in the dtypes that they have; accelerate (1.15) would make FP32 masters of them.

    It does so where mixed precision is on. Here that means autocast, which QATTrainer switches on itself.
    """
    prepare, state = accelerator._prepare_fsdp2, accelerator.state

    def prepare_as_they_are(*args):
        precision, state._mixed_precision = state._mixed_precision, "no"
        try:
            return prepare(*args)
        finally:
            state._mixed_precision = precision

    vars(accelerator)["_prepare_fsdp2"] = prepare_as_they_are


@contextmanager
def full_state_dict(plugin) -> Iterator[None]:
    """Let `plugin` ask for FULL_STATE_DICT inside; its own type and its settings are back afterwards, come what may."""
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in names}
    try:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of another type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)


@contextmanager
def cores_of_waiting_processes() -> Iterator[None]:
    """Let the process that alone reads the weights compute on all cores of its machine, while the others wait for it.

    accelerate gives each of several processes one core (OMP_NUM_THREADS=1), and 8 billion weights are converted to FP32
    and looked through for NaN here.
    """
    threads = torch.get_num_threads()
    try:
        if first_process_loads() and not waits_for_weights():
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads)
        yield
    finally:
        torch.set_num_threads(threads)


def initialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a new `optimizer` its state, by a step that changes nothing.

    accelerate (1.15) loads a sharded FSDP1 optimizer into the tensors that exist already. A new optimizer has none, so
    its moments would silently start again from zero.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.numel():
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def round_parameters(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Round each named parameter to its dtype in `dtypes`, in place, whole or sharded; others do not change.

    Parameters that FSDP still holds gathered from the last forward pass would be used again as they were: they are
    freed, so that the next forward pass gathers the rounded ones.
    """
    for prefix, module in _units(model):
        if isinstance(module, FSDPModule):
            module.reshard()
        with FSDP.summon_full_params(module, recurse=False) if isinstance(module, FSDP) else nullcontext():
            for name, parameter in module.named_parameters(prefix):
                if (dtype := dtypes.get(original_name(name))) is not None:
                    parameter.copy_(parameter.to(dtype))


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 still holds gathered from the last forward pass: what is written then reaches the shards."""
    for _, module in _units(model):
        if isinstance(module, FSDPModule):
            module.reshard()


def _units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each FSDP1 unit, each FSDP2 unit, and the model itself at the end."""
    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDP | FSDPModule)]
    return [unit for unit in units if unit[1] is not model] + [("", model)]
