"""Load models and tokenizers with transformers: plain ones, GGUF files, skeletons without weights."""

from __future__ import annotations

import os

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.tokenizer import load_tokenizer as tokenizer_of
from qat.checkpoints.fit import check_finite, load_checked
from qat.checkpoints.load import load_plain
from qat.checkpoints.model_config import read_config

from ..arguments.model import ModelArguments
from ..arguments.training import TrainingArguments

_CPU = torch.device("cpu")


def device_of_weights(args: TrainingArguments, packs_base: bool) -> torch.device:
    """Where weights are converted, compared and quantized once they are read: the GPU that trains them, or the CPU.

    It is the CPU for weights that need not fit a GPU as they are read: those that FSDP or DeepSpeed shards, that are
    rounded before they get there, and those of a base that is packed (`packs_base`). So it is for other accelerators,
    on which this was not tried.
    """
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    shards = any(os.environ.get(switch, "").lower() in ("true", "1") for switch in switches)
    shards = shards or bool(args.fsdp or args.deepspeed)  # which set no variable before there is a Trainer
    narrows = not args.do_train and (args.bf16_full_eval or args.fp16_full_eval)
    return _CPU if shards or narrows or packs_base or args.device.type != "cuda" else args.device


def load_unquantized(
    model_args: ModelArguments, cache_dir: str | None = None, device: torch.device = _CPU
) -> PreTrainedModel:
    """Load an unquantized model in its own dtype, or a GGUF file, which is dequantized, on the CPU.

    Args:
        device: of the weights of a model that is no GGUF file.

    Raises:
        UserError: see `load_plain`; or the GGUF file cannot be read.
    """
    if model_args.gguf_file is None:
        return load_plain(
            model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code, cache_dir=cache_dir,
            device=device,
        )  # fmt: skip
    where = f"--gguf_file {model_args.gguf_file!r} in --model_name_or_path {model_args.model_name_or_path!r}"
    model = load_checked(
        lambda: AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, gguf_file=model_args.gguf_file, cache_dir=cache_dir, dtype=torch.bfloat16,
            trust_remote_code=model_args.trust_remote_code, output_loading_info=True, **_dequantize_gguf(),
        ),
        where,
    )  # fmt: skip
    check_finite(model.named_parameters(), where)
    _forget_gguf(model)
    return model


def load_tokenizer(model_args: ModelArguments, model_max_length: int, cache_dir: str | None = None):
    """The model's tokenizer, see `data.tokenizer`: it truncates at `model_max_length` and has a padding token."""
    return tokenizer_of(
        model_args.model_name_or_path, model_max_length, gguf_file=model_args.gguf_file,
        trust_remote_code=model_args.trust_remote_code, cache_dir=cache_dir,
    )  # fmt: skip


def _dequantize_gguf() -> dict:
    """transformers 5.2x keeps GGUF weights in their blocks unless told otherwise; earlier versions always unpack."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the quantization attributes: the weights are plain now, and these would prevent saving."""
    model.hf_quantizer = None
    model.is_quantized = False
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    if getattr(model, "quantization_method", None) is not None:
        model.quantization_method = None


def without_weights(model_args: ModelArguments, cache_dir: str | None = None) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers in memory: for processes that read no file."""
    name, gguf = model_args.model_name_or_path, model_args.gguf_file
    options = {} if gguf is None else {"gguf_file": gguf}
    config = read_config(name, f"--model_name_or_path {name!r}", model_args.trust_remote_code, cache_dir, **options)
    if getattr(config, "quantization_config", None) is not None:  # packed: the first process dequantizes it
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
        )
    model.tie_weights()  # parameters were replaced one by one
    return model
