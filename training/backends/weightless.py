"""Load weights in the first process only: under FSDP, wrapping the model sends the others their shards.

That is what `fsdp_cpu_ram_efficient_loading` means, but transformers (5.23) reads all weights in every process. So here
the others get a model whose parameters are on the meta device. Its buffers are real: accelerate sends parameters only.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from transformers import PreTrainedModel


def first_process_loads() -> bool:
    """Whether weights are read by the first process alone."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return PartialState().num_processes > 1 and all(os.environ.get(s, "").lower() in ("true", "1") for s in switches)


def waits_for_weights() -> bool:
    """Whether this process is one of those that read no weights."""
    return first_process_loads() and not PartialState().is_main_process


def take_dtypes(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters on the meta device the dtypes by name that they have in the first process.

    FSDP2 sends the other processes their parts in the dtypes that these have, whatever arrives.
    """
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))


def give_storage(model: PreTrainedModel) -> None:
    """Move parameters from the meta device to memory that is never written, and so never allocated by the machine.

    accelerate (1.15) finds an FSDP2 optimizer's parameters again by their addresses, which are all 0 on the meta
    device: the optimizer would silently update one parameter in place of all.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        model.tie_weights()
