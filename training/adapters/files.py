"""Adapters in PEFT's own files, adapter_config.json and adapter_model.safetensors, which peft and engines load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from qat.errors import UserError
from qat.files.model_folder import ADAPTER_NAME
from qat.layers.lora import FACTORS, NAME, adapters
from qat.layers.names import original_name

from .inject import config_of

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def factor_names(model: nn.Module) -> dict[str, str]:
    """PEFT's name of each factor of a model's adapters, by its name in the model."""
    return {
        f"{original_name(name)}.{NAME}.{factor}": f"{_PREFIX}{original_name(name)}.{factor}.weight"
        for name in adapters(model)
        for factor in FACTORS
    }


def write_adapter(folder: str | Path, model: nn.Module, factors: dict[str, torch.Tensor], base: str | None) -> None:
    """Write the adapters of a model into a folder, in FP32.

    Args:
        factors: complete tensors by their names in the model.
        base: folder or hub id of the model that the adapters are for.
    """
    config = config_of(model)
    assert config is not None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        published: factors[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, published in factor_names(model).items()
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    saved = LoraConfig(**{**_settings(config), "base_model_name_or_path": base, "inference_mode": True})
    if isinstance(saved.init_lora_weights, str):  # done already: the base's weights are those that go with it
        saved.init_lora_weights = True
    saved.save_pretrained(str(folder))


def _settings(config: LoraConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name in LoraConfig.__dataclass_fields__}


def read_factors(folder: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The factors in a folder by their names in the model, on the CPU.

    Raises:
        UserError: the folder holds no adapters, or others than the model has.
    """
    path = Path(folder, WEIGHTS_NAME)
    if not path.is_file():
        raise UserError(f"{folder} has no adapters ({WEIGHTS_NAME})")
    found, wanted = load_file(path), factor_names(model)
    parameters = {original_name(name): p for name, p in model.named_parameters()}
    if missing := sorted(published for published in wanted.values() if published not in found):
        raise UserError(f"{path} lacks {missing[0]} and {len(missing) - 1} more; its adapters are of other layers")
    if foreign := sorted(found.keys() - wanted.values()):
        raise UserError(f"{path} has {foreign[0]} and {len(foreign) - 1} more, which the model has no place for")
    for name, published in wanted.items():
        if found[published].shape != parameters[name].shape:
            raise UserError(
                f"{path}: {published} has shape {tuple(found[published].shape)}, the model's adapter "
                f"{tuple(parameters[name].shape)}; give the same --lora_r"
            )
    return {name: found[published] for name, published in wanted.items()}


def read_config(folder: str | Path) -> LoraConfig:
    """PEFT's configuration in a folder.

    Raises:
        UserError: there is none, or it is not one of LoRA.
    """
    if not Path(folder, ADAPTER_NAME).is_file():
        raise UserError(f"--adapter_name_or_path {str(folder)!r} has no {ADAPTER_NAME}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise UserError(f"--adapter_name_or_path {str(folder)!r} is of type {config.peft_type}; only LoRA is read")
    return config
