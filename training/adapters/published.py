"""Somebody's LoRA adapter in PEFT's format: found, and refused by name where it is more than A and B.

What a published configuration says of training alone (dropout, how A and B began) has no part in what is computed with
the adapter, and is not kept.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft import __version__ as PEFT_VERSION
from transformers.utils import cached_file

from qat.checkpoints.fit import first_line
from qat.errors import UserError
from qat.files.json_file import read_object
from qat.files.model_folder import ADAPTER_NAME, ADAPTER_WEIGHTS_NAME, check_adapter_folder

logger = logging.getLogger(__name__)

_ARGUMENT = "--adapter_name_or_path"
_PICKLE = "adapter_model.bin"
# Settings that change what an adapter computes, and what they would need here.
_REFUSED = {
    "use_dora": "DoRA divides by the norm of the merged weight",
    "modules_to_save": "it has whole layers of its own beside A and B",
    "trainable_token_indices": "it has rows of the embedding of its own beside A and B",
    "lora_bias": "it has biases of its own beside A and B",
    "layer_replication": "it is for a model with copies of layers",
    "megatron_config": "it is for Megatron's parallel layers",
    "alora_invocation_tokens": "an activated LoRA is added from some token on, so no merged weight has it",
    "use_qalora": "QA-LoRA pools the input, so no merged weight has it",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it mixes several adapters by token, so no merged weight has them",
    "velora_config": "VeLoRA compresses activations",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA removes a part of the base",
}
# Initialisations that take something out of the base, which the published model does not lack.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OF_TRAINING = {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
_MERGE = "merge it into its base with peft (merge_and_unload), and give the merged model as --model_name_or_path"


def find_adapter(name: str, cache_dir: str | None = None) -> Path:
    """The local folder `name`, or that of a hub id in the cache, with adapter_config.json and safetensors.

    Raises:
        UserError: there is no such adapter, or its weights are pickled.
    """
    folder = check_adapter_folder(name, _ARGUMENT)
    if folder is None:
        folder = _cached(name, ADAPTER_NAME, cache_dir).parent
        _cached(name, ADAPTER_WEIGHTS_NAME, cache_dir)
        check_adapter_folder(folder, _ARGUMENT)
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        if (folder / _PICKLE).is_file():
            raise UserError(
                f"{_ARGUMENT} {name!r} has its weights in {_PICKLE}, a pickle, which can run code when it is loaded; "
                "only safetensors are read. If you trust its author, load it with peft once and save it with "
                "save_pretrained, which writes safetensors"
            )
        raise UserError(f"{_ARGUMENT} {name!r} has no {ADAPTER_WEIGHTS_NAME}; give a complete adapter in PEFT's format")
    return folder


def _cached(name: str, file: str, cache_dir: str | None) -> Path:
    try:
        return Path(cached_file(name, file, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{_ARGUMENT} {name!r} is neither a folder nor an adapter in PEFT's format that can be had from the hub or "
            f"its cache ({file}): {first_line(error)}"
        ) from error


def read_config(folder: str | Path, base: str | None = None) -> LoraConfig:
    """PEFT's configuration in a folder, as far as it says what is computed.

    Args:
        base: the model that the adapter is going to be used with; another one than the configuration names is logged.

    Raises:
        UserError: there is none, it is not one of LoRA, or has settings that a merged weight cannot do.
    """
    where = f"{_ARGUMENT} {str(folder)!r}"
    settings = read_object(Path(folder, ADAPTER_NAME))
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{where} is of type {kind!r}; only LoRA adapters are read")
    _check_settings(where, settings)
    if settings.get("lora_dropout"):
        logger.info("%s was trained with dropout %s, which is not used here", where, settings["lora_dropout"])
    named = settings.get("base_model_name_or_path")
    if base is not None and named is not None and not _is_same(named, base):
        logger.warning("%s names the base %r; here it is added to --model_name_or_path %r", where, named, base)
    known = {f.name for f in fields(LoraConfig)} - _OF_TRAINING
    kept = {name: value for name, value in settings.items() if name in known}
    try:
        return LoraConfig(**kept | {"lora_dropout": 0.0, "inference_mode": False, "base_model_name_or_path": None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: its {ADAPTER_NAME} is damaged: {first_line(error)}") from error


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise UserError(f"{where} has {name}, which does not work here: {reason}; {_MERGE}")
    if (bias := settings.get("bias", "none")) != "none":
        raise UserError(f"{where} has bias {bias!r}, so it has biases of its own beside A and B; {_MERGE}")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise UserError(
            f"{where} has init_lora_weights {init!r}: it belongs to a base without what was taken out of it then; have "
            "peft convert it (save_pretrained with path_initial_model_for_weight_conversion), or " + _MERGE
        )
    rank = settings.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}: its {ADAPTER_NAME} is damaged: r is {rank!r}, no rank; copy or save it again")
    unknown = [name for name in settings if name not in {f.name for f in fields(LoraConfig)} and settings[name]]
    if unknown:
        raise UserError(
            f"{where} has the setting {unknown[0]!r}, which PEFT {PEFT_VERSION} does not know: what it computes is not "
            f"known; {_MERGE}"
        )


def _is_same(named: str, base: str) -> bool:
    return named == base or (Path(base).exists() and Path(named).resolve() == Path(base).resolve())
