"""Adapters in PEFT's own files, adapter_config.json and adapter_model.safetensors, which peft and engines load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qat.errors import UserError
from qat.files.json_file import read_object
from qat.files.model_folder import ADAPTER_NAME, ADAPTER_WEIGHTS_NAME
from qat.layers.lora import FACTORS, NAME, adapters
from qat.layers.names import original_name

from .inject import config_of
from .stacks import as_published, from_published

_PREFIX = "base_model.model."
_FLOATS = ("F32", "BF16", "F16")


def factor_names(model: nn.Module) -> dict[str, str]:
    """PEFT's name of each factor of a model's adapters, by its name in the model."""
    return {
        f"{original_name(name)}.{NAME}.{factor}": f"{_PREFIX}{_layer_name(original_name(name), module)}.{factor}.weight"
        for name, module in adapters(model).items()
        for factor in FACTORS
    }


def _layer_name(name: str, module: nn.Module) -> str:
    return module.get_submodule(NAME).published or name


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
        published: as_published(name, factors[name].detach()).to("cpu", torch.float32, copy=True).contiguous()
        for name, published in factor_names(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    saved = LoraConfig(**{**_settings(config), "base_model_name_or_path": base, "inference_mode": True})
    if isinstance(saved.init_lora_weights, str):  # peft would decompose the base again
        saved.init_lora_weights = True
    if not isinstance(saved.target_modules, str):  # peft makes a set of them, whose order differs between processes
        saved.target_modules = sorted(saved.target_modules)
    saved.save_pretrained(str(folder))


def _settings(config: LoraConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name in LoraConfig.__dataclass_fields__}


def read_factors(folder: str | Path, model: nn.Module, where: str = "") -> dict[str, torch.Tensor]:
    """The factors in a folder by their names in the model, on the CPU.

    Args:
        where: what the user named the folder by, for messages.

    Raises:
        UserError: the folder holds no adapters, or others than the model has, or non-finite values.
    """
    check_factors(folder, model, where)
    found = load_file(Path(folder, ADAPTER_WEIGHTS_NAME))
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where or folder}: {name} has NaN or infinite values; take another copy of the adapter")
    shapes = {original_name(name): parameter.shape for name, parameter in model.named_parameters()}
    return {
        name: from_published(name, found[published], shapes[name]) for name, published in factor_names(model).items()
    }


def check_factors(folder: str | Path, model: nn.Module, where: str = "") -> None:
    """Compare the names, shapes and dtypes of the factors in a folder with a model's; reads no values.

    Raises:
        UserError: see `read_factors`.
    """
    path, where = Path(folder, ADAPTER_WEIGHTS_NAME), where or str(folder)
    if not path.is_file():
        raise UserError(f"{where} has no adapters ({ADAPTER_WEIGHTS_NAME})")
    found, wanted = _shapes(path), factor_names(model)
    parameters = {original_name(name): p for name, p in model.named_parameters()}
    if missing := sorted(published for published in wanted.values() if published not in found):
        raise UserError(
            f"{where}: {ADAPTER_WEIGHTS_NAME} lacks {_some(missing)}; its adapters are of other layers than here"
        )
    if foreign := sorted(found.keys() - wanted.values()):
        raise UserError(f"{where}: {ADAPTER_WEIGHTS_NAME} has {_some(foreign)}, which no adapter of the model has")
    for name, published in wanted.items():
        shape, dtype = found[published]
        own = tuple(as_published(name, torch.empty(parameters[name].shape, device="meta")).shape)
        if shape != own:
            raise UserError(
                f"{where}: {published} has shape {shape}, the model's adapter {own}; it is of another rank, or for "
                "another model"
            )
        if dtype not in _FLOATS:
            raise UserError(f"{where}: {published} is stored as {dtype}; one of {', '.join(_FLOATS)} is read")


def _shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor in a file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; copy or save it again") from error


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# By PEFT's name; all decide what the factors of a checkpoint mean, and "r" and the like are arguments of main.py.
_SCALING = {"r": "--lora_r", "lora_alpha": "--lora_alpha", "use_rslora": "--use_rslora"}


def check_same_adapters(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse to resume adapters of another rank or scaling, or of other layers; reads no values.

    Raises:
        UserError: as described.
    """
    config = config_of(model)
    assert config is not None
    saved, own = read_object(Path(checkpoint, ADAPTER_NAME)), config.to_dict()
    start = f"cannot resume from {checkpoint}"
    remedy = "or another --output_dir, or --resume_from_checkpoint False to start anew"
    for name, argument in _SCALING.items():
        if saved.get(name) != own[name]:
            raise UserError(
                f"{start}: it was written with {argument} {saved.get(name)}, and this run has {own[name]}; give "
                f"{argument} {saved.get(name)}, {remedy}"
            )
    try:
        check_factors(checkpoint, model, str(checkpoint))
    except UserError as error:
        raise UserError(f"{start}: {error}; give the same --lora_target, {remedy}") from error
