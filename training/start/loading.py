"""Load models and tokenizers with transformers: plain ones, GGUF files, skeletons without weights."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qat.errors import UserError

from ..arguments.model import ModelArguments


def load_plain(model_args: ModelArguments, cache_dir: str | None = None) -> PreTrainedModel:
    """Load an unquantized model in its own dtype, or a GGUF file, which is dequantized.

    Raises:
        UserError: the model is quantized in a format that training cannot start from.
    """
    kwargs = {"cache_dir": cache_dir, "dtype": "auto", "trust_remote_code": model_args.trust_remote_code}
    if model_args.gguf_file is not None:
        kwargs |= {"gguf_file": model_args.gguf_file, "dtype": torch.bfloat16, **_dequantize_gguf()}
    else:
        kwargs["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **kwargs)
    _check_plain(model, model_args)
    if model_args.gguf_file is not None:
        _forget_gguf(model)
    return model


def _check_plain(model: PreTrainedModel, model_args: ModelArguments) -> None:
    if model_args.gguf_file is None and getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path!r} is quantized by "
            f"{getattr(model, 'quantization_method', None)}; training starts from BF16 weights, or from a local folder "
            "packed in MXFP4, MXFP8 or FP8 by compressed-tensors, or in MXFP4 or MXFP8 by AutoRound "
            "(download a hub model first)"
        )


def load_tokenizer(model_args: ModelArguments, model_max_length: int, cache_dir: str | None = None):
    """Load the model's tokenizer: it truncates at `model_max_length` and has a padding token."""
    kwargs = {"gguf_file": model_args.gguf_file} if model_args.gguf_file is not None else {}
    kwargs["trust_remote_code"] = model_args.trust_remote_code
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, cache_dir=cache_dir, model_max_length=model_max_length, **kwargs
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
