"""Load a model as FP32 master weights, remembering the dtype it came in.

At QAT's learning rates Adam's updates are smaller than half a BF16 step and would vanish, so weights are trained in
FP32 and computed with in BF16 (autocast) on every backend; what is saved goes back to the original dtype.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qat import QATConfig
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.unpack import is_packed, load_packed
from qat.files.trust import check_model_folder
from qat.layers.finish import check_baked

from ..arguments.model import ModelArguments
from ..backends.weightless import first_process_loads, waits_for_weights

logger = logging.getLogger(__name__)


def load_model(model_args: ModelArguments, cache_dir: str | None = None) -> PreTrainedModel:
    """Any causal language model, in FP32; `model.original_dtypes` maps each tensor's name to its stored dtype.

    Under FSDP with `fsdp_cpu_ram_efficient_loading` only the first process has weights, see weightless.py.
    """
    check_model_folder(model_args.model_name_or_path)
    _check_finished(model_args.model_name_or_path)
    if waits_for_weights():
        model = model_without_weights(model_args, cache_dir)
    else:
        model = _model_with_weights(model_args, cache_dir)
        model.original_dtype = model.dtype
        tensors = model.state_dict(keep_vars=True)
        model.original_dtypes = {name: t.dtype for name, t in tensors.items() if t.is_floating_point()}
        model.float()
    if first_process_loads():
        share_facts(model)
    model.config.use_cache = False  # a cache of keys and values is of no use in training
    _mend_generation_config(model)
    return model


def _model_with_weights(model_args: ModelArguments, cache_dir: str | None) -> PreTrainedModel:
    kwargs = {"cache_dir": cache_dir, "dtype": "auto", "trust_remote_code": model_args.trust_remote_code}
    if model_args.gguf_file is not None:
        kwargs |= {"gguf_file": model_args.gguf_file, "dtype": torch.bfloat16, **_dequantize_gguf()}
    elif is_packed(model_args.model_name_or_path):
        return load_packed(model_args.model_name_or_path)
    else:
        kwargs["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **kwargs)
    _check_plain(model, model_args)
    if model_args.gguf_file is not None:
        _forget_gguf(model)
    return model


def _check_plain(model: PreTrainedModel, model_args: ModelArguments) -> None:
    if model_args.gguf_file is None and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path!r} is quantized by "
            f"{getattr(model, 'quantization_method', None)}; training starts from BF16 weights, or from a local folder "
            "packed in MXFP4 or MXFP8 by compressed-tensors or AutoRound (download a hub model first)"
        )


def _check_finished(folder: str) -> None:
    """Refuse a checkpoint to resume from whose learned exponents are not in its weights yet."""
    config = QATConfig.load(folder) if Path(folder).is_dir() else None
    if config is not None and config.training.get("learn_exponent"):
        check_baked(CheckpointFolder.open(folder).names, folder)


def load_tokenizer(model_args: ModelArguments, model_max_length: int, cache_dir: str | None = None):
    """The model's tokenizer, cutting at `model_max_length`, with a padding token."""
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
    """The weights are plain now; what remembers the blocks would keep the model from being saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    if getattr(model, "quantization_method", None) is not None:
        model.quantization_method = None


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Some published models set sampling parameters without do_sample; transformers then refuses to save them."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        logger.warning("generation config: set do_sample=True, since it would not be saved otherwise (%s)", error)
        model.generation_config.do_sample = True


# ---- Under FSDP, in the other processes ----

# What the first process learned of the model while reading its weights, and the others must know too.
_FACTS = ("original_dtype", "original_dtypes", "packed_qat_config")


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


def share_facts(model: PreTrainedModel) -> None:
    """Give all processes what the first one knows of the model it loaded. All of them must call it."""
    facts = [getattr(model, name, None) for name in _FACTS]
    broadcast_object_list(facts)
    for name, fact in zip(_FACTS, facts, strict=True):
        if fact is not None:
            setattr(model, name, fact)
