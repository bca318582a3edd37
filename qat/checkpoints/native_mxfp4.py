"""gpt-oss's native format where transformers reads it: experts in MXFP4, which become BF16 when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.quantization_config import Mxfp4Config

from ..files.model_folder import quantizer_of
from .dialects.mxfp4 import FORMAT
from .folder import read_config_file


def loading_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` must be told, so that a model in the native format is dequantized, on every machine.

    transformers would keep it packed, and not trainable, where it finds kernels for it.
    """
    settings = getattr(config, "quantization_config", None)
    is_dequantized = isinstance(settings, dict) and settings.get("quant_method") == FORMAT
    return {"quantization_config": Mxfp4Config(dequantize=True)} if is_dequantized else {}


def is_native(folder: Path) -> bool:
    """Whether the model in `folder` is stored in the native format, by its config.json.

    Raises:
        UserError: it has no config.json, or a damaged one.
    """
    return quantizer_of(folder, read_config_file(folder)) == FORMAT


def forget_format(model: Any) -> None:
    """Let a model that was dequantized be saved under the names of its parameters.

    transformers (5.23) applies the conversions of loading in reverse when it saves. That of the native format has no
    reverse: BF16 values would be saved as `gate_up_proj_blocks`, and no folder with this name and a plain config.json
    can be loaded again.
    """
    from transformers.integrations.mxfp4 import Mxfp4Dequantize

    if conversions := getattr(model, "_weight_conversions", None):
        is_native = [any(isinstance(op, Mxfp4Dequantize) for op in getattr(c, "operations", ())) for c in conversions]
        model._weight_conversions = [c for c, drop in zip(conversions, is_native, strict=True) if not drop]
