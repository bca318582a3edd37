"""Read what a model is from its config.json, of a local folder or a hub id, before any weight is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from ..errors import UserError
from ..files.json_file import read_object
from ..files.model_folder import ADAPTER_NAME, CONFIG_NAME, adapter_error, check_files, check_model_folder, quantizer_of
from .fit import code_error, first_line
from .folder import is_packed_by, read_config_file

logger = logging.getLogger(__name__)

# The text models of multimodal models that transformers has no causal language model of, and the kind with the same
# layers and names.
_MADE_OF = {
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip
_QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def find_folder(name: str | Path, argument: str = "--model_name_or_path", cache_dir: str | None = None) -> Path:
    """The local folder `name`, or that of a hub id in the cache, in which not all files need be there yet.

    Raises:
        UserError: see `check_model_folder`; or the hub has no such model, or cannot be reached.
    """
    folder = check_model_folder(name, argument)
    if folder is not None:
        return folder
    try:
        adapter = cached_file(str(name), ADAPTER_NAME, cache_dir=cache_dir, **_QUIET)
        config = None if adapter else cached_file(str(name), CONFIG_NAME, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{argument} {str(name)!r} is neither a folder nor a model that can be had from the hub or its cache: "
            f"{first_line(error)}"
        ) from error
    if adapter is not None:
        raise adapter_error(name, argument, read_object(adapter))
    assert config is not None
    folder = Path(config).parent
    check_files(folder)
    return folder


def check_readable(folder: Path, where: object) -> bool:
    """Whether the model in `folder` is packed, so that `load_packed` should read it.

    Raises:
        UserError: it is quantized by a method that is not read, or has no config.json.
    """
    config = read_config_file(folder)
    return is_packed_by(quantizer_of(folder, config), config, where)


def read_config(
    name: str | Path, where: object, trust_remote_code: bool = False, cache_dir: str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    """transformers' configuration of a causal language model; `where` is for messages.

    Raises:
        UserError: it needs code that must not run, holds what transformers cannot make a configuration of, or is of a
            multimodal model that is no causal language model.
    """
    config = read_any_config(name, where, trust_remote_code, cache_dir, **kwargs)
    _check_causal(name, where, config)
    return config


def read_any_config(
    name: str | Path, where: object, trust_remote_code: bool = False, cache_dir: str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    """The same of a model of any kind."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, cache_dir=cache_dir, **kwargs)
    except Exception as error:  # its validators raise classes of their own
        if "trust_remote_code" in str(error):
            raise code_error(where) from error
        raise UserError(
            f"{where}: transformers cannot read its {CONFIG_NAME}: {type(error).__name__}: {first_line(error)}"
        ) from error


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration of the causal language model inside a multimodal one; None where transformers has none.

    That of Qwen's vision-language models is computed by the class of the language model that they were made of: for
    text, the three equal positions of their rotary embedding are one.
    """
    text = config.get_text_config(decoder=True)
    kind = _MADE_OF.get(text.model_type, text.model_type)
    if text is config or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    if kind == text.model_type:
        return text
    content = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    content["rope_parameters"] = {
        key: value for key, value in text.rope_parameters.items() if not key.startswith("mrope_")
    }
    return AutoConfig.for_model(kind, **content)


def log_left_out(config: PreTrainedConfig, model: PreTrainedModel, where: object) -> None:
    """Say which parts of a multimodal model its language model does without, where transformers loads that alone."""
    if isinstance(model.config, type(config)) or config.get_text_config(decoder=True) is config:
        return
    text = type(config.get_text_config(decoder=True))
    parts = [name.removesuffix("_config") for name in config.sub_configs if not isinstance(getattr(config, name), text)]
    logger.warning(
        "%s: only the language model is loaded (%s); what is saved does not have the other parts of %s: %s",
        where, type(model).__name__, type(config).__name__, ", ".join(parts),
    )  # fmt: skip


def _check_causal(name: str | Path, where: object, config: PreTrainedConfig) -> None:
    """Refuse a multimodal model that is no causal language model, before transformers lists all those that are.

    Raises:
        UserError: it is one; the message says how its language model becomes a folder of its own.
    """
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if is_causal or config.get_text_config(decoder=True) is config:
        return
    text = text_config_of(config)
    if text is None:
        kind = config.get_text_config(decoder=True).model_type
        raise UserError(
            f"{where} is a multimodal model ({config.model_type}), and transformers has no causal language model of "
            f"its kind of text model ({kind}); give a causal language model"
        )
    raise UserError(
        f"{where} is a multimodal model ({config.model_type}) and no causal language model; write the language model "
        f"in it ({MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]}) into a folder of its own, and give that: python "
        f"scripts/text_model.py {name} DIR"
    )
