"""Under FSDP only the first process needs weights; the others are sent their shares when the model is wrapped.

That is what `fsdp_cpu_ram_efficient_loading` means, but transformers (5.23) reads all weights in every process. So here
the others get a model whose parameters are on the meta device. Its buffers are real: accelerate sends parameters only.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .arguments import ModelArguments

# What the first process learned of the model while reading its weights, and the others must know too.
_FACTS = ("original_dtype", "original_dtypes", "packed_qat_config")


def first_process_loads() -> bool:
    """Whether weights are read by the first process alone."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return PartialState().num_processes > 1 and all(os.environ.get(s, "").lower() in ("true", "1") for s in switches)


def waits_for_weights() -> bool:
    """Whether this process is one of those that read none."""
    return first_process_loads() and not PartialState().is_main_process


def model_without_weights(model_args: ModelArguments, cache_dir: str | None = None) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers in memory."""
    kwargs = {"cache_dir": cache_dir, "trust_remote_code": model_args.trust_remote_code}
    if model_args.gguf_file is not None:
        kwargs["gguf_file"] = model_args.gguf_file
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **kwargs)
    if getattr(config, "quantization_config", None) is not None:  # packed: the first process dequantizes it
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
        )
    model.tie_weights()  # parameters were replaced one by one
    return model


def give_storage(model: PreTrainedModel) -> None:
    """Move parameters from the meta device to memory that is never written, and so never taken from the machine.

    accelerate (1.15) finds an FSDP2 optimizer's parameters again by their addresses, which are all 0 on the meta
    device: the optimizer would update one parameter in place of all, without a word.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        model.tie_weights()


def share_facts(model: PreTrainedModel) -> None:
    """Give all processes what the first one knows of the model it loaded. All of them must call it."""
    facts = [getattr(model, name, None) for name in _FACTS]
    broadcast_object_list(facts)
    for name, fact in zip(_FACTS, facts, strict=True):
        if fact is not None:
            setattr(model, name, fact)
