"""What a packed folder holds, by its headers: the layers, their formats and schemes, and whether anything is missing.

The layout of a layer is told by its tensors (see layouts.py), its inputs by the folder's settings (see settings.py), so
folders of other programs are read as well.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..layers.restore import prepare_as_saved
from ..layers.sites import quantized_sites
from ..schemes.config import QAT_CONFIG_NAME, QATConfig
from ..schemes.presets import get_scheme
from ..schemes.spec import VIEW_DTYPE
from .fit import check_dtypes, check_finite, fitting, load_checked
from .folder import CheckpointFolder, Reader
from .input_transforms import check_matrices, check_no_transforms, is_matrix
from .layouts import PackedLayer, check_tensor, packed_layers
from .model_config import read_config
from .packed_sites import SitePart, by_modules, check_formats, parts_of_layers, schemes_of_modules, weights_of
from .settings import Declared, check_settings, declared, has_key_value_scheme, read_settings
from .stored_names import StoredNames

# Scales of a key/value cache: compressed-tensors' names, and Model-Optimizer's below the projections.
_KEY_VALUE_SCALE = re.compile(r"(.+?)(?:\.([kv])_proj)?\.([kv])_scale")


@dataclass(frozen=True)
class PackedFolder:
    """A packed checkpoint whose headers are in order.

    Attributes:
        checkpoint: the folder.
        layers: its packed layers by name, as the files have it.
        parts: of which site of the model each of them is the weight, or a part of it; by the same names.
        own: its own qat_config.json; None where it has none, since another program packed it.
        declared: what the settings of such a folder say of each layer; empty where `own` says it.
        key_value_scales: names of the tensors that hold scales of the key/value cache, by compressed-tensors' names
            below the model's modules.
        caches_fp8: whether the settings say that engines cache keys and values in FP8.
    """

    checkpoint: CheckpointFolder
    layers: dict[str, PackedLayer]
    parts: dict[str, SitePart]
    own: QATConfig | None
    declared: dict[str, Declared]
    key_value_scales: dict[str, str]
    caches_fp8: bool

    @property
    def packed_names(self) -> set[str]:
        """All tensors that a plain checkpoint does not have."""
        of_layers = {name for layer in self.layers.values() for name in layer.tensors.values()}
        return of_layers | set(self.key_value_scales.values()) | set(filter(is_matrix, self.checkpoint.stored))

    def tensors_of(self, name: str, read: Reader | None = None) -> dict[str, torch.Tensor]:
        """The tensors of a layer by the last parts of their names, their values checked.

        Args:
            read: of `CheckpointFolder.reading`, for many layers.
        """
        layer = self.layers[name]
        if read is None:
            with self.checkpoint.reading() as read:
                return self.tensors_of(name, read)
        tensors = {part: read(stored) for part, stored in layer.tensors.items()}
        for part, tensor in tensors.items():
            check_tensor(part, tensor, layer, self.checkpoint.path)
        return tensors

    def plain_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The other tensors of the checkpoint, memory-mapped."""
        packed = self.packed_names
        for file in self.checkpoint.shards:
            yield from ((name, tensor) for name, tensor in self.checkpoint.tensors(file) if name not in packed)


def check_packed(
    folder: str | Path,
    argument: str = "the packed folder",
    trust_remote_code: bool = False,
    allows_transforms: bool = False,
) -> PackedFolder:
    """Open a packed checkpoint and refuse one that lacks anything, by its headers alone.

    Args:
        allows_transforms: whether its inputs may be transformed: who computes with it transforms them.

    Raises:
        UserError: the folder is damaged or incomplete, packed in a format that is not known, or in another than its
            settings or its qat_config.json say; or it packs what is no linear layer.
    """
    checkpoint = CheckpointFolder.open(folder, argument)
    settings, own = read_settings(checkpoint.path, checkpoint.config), QATConfig.load(folder)
    if not checkpoint.is_packed:
        raise UserError(f"{checkpoint.path} is not a packed checkpoint: its config.json has no quantization_config")
    if own is None:
        check_settings(settings, checkpoint.path)
        check_no_transforms(checkpoint)  # nothing says which inputs they belong to
    if not allows_transforms:
        check_no_transforms(checkpoint)
    layers = packed_layers(checkpoint.stored, checkpoint.path, settings["quant_method"])
    said = {}
    if own is None:
        said = declared(settings, {name: layer.format for name, layer in layers.items()}, checkpoint.path)
    caches_fp8 = has_key_value_scheme(settings, checkpoint.path)
    key_value_scales = _key_value_scales(checkpoint)
    packed_names = {*key_value_scales.values(), *(name for layer in layers.values() for name in layer.tensors.values())}
    packed_names |= set(filter(is_matrix, checkpoint.stored))
    stored = {name: tensor for name, tensor in checkpoint.stored.items() if name not in packed_names}
    names = StoredNames(skeleton := skeleton_of(checkpoint, trust_remote_code), {*stored, *weights_of(layers)})
    parts = parts_of_layers(skeleton, names, layers, checkpoint.path)
    schemes_of_modules(parts, said, checkpoint.path)  # checks that they agree
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    shapes |= {parts[name].tensor: parts[name].shape_of(layer) for name, layer in layers.items()}
    empty = {name: torch.empty(shape, dtype=VIEW_DTYPE, device="meta") for name, shape in shapes.items()}
    model = model_of(checkpoint, empty, trust_remote_code, device_map="meta")
    check_dtypes(stored, model, checkpoint.path)
    key_value_scales = by_modules(model, names, key_value_scales)
    packed = PackedFolder(checkpoint, layers, parts, own, said, key_value_scales, caches_fp8)
    for name in layers:
        _check_input_scale(packed, name)
    if own is not None:
        _check_own_config(packed, own, model)
    return packed


def check_packed_values(
    folder: str | Path, argument: str = "the packed folder", trust_remote_code: bool = False
) -> None:
    """`check_packed` for an engine, and a UserError for scales, codes or other tensors that are NaN or infinite."""
    packed = check_packed(folder, argument, trust_remote_code, allows_transforms=True)
    with packed.checkpoint.reading() as read:
        for name in packed.layers:
            packed.tensors_of(name, read)
    check_finite(packed.plain_tensors(), packed.checkpoint.path)


def _key_value_scales(checkpoint: CheckpointFolder) -> dict[str, str]:
    """Names of the tensors with scales of the key/value cache, by compressed-tensors' names for them."""
    found = {}
    for name, stored in checkpoint.stored.items():
        match = _KEY_VALUE_SCALE.fullmatch(name)
        if match and match[2] in (None, match[3]):
            if stored.shape not in ((), (1,)):
                raise UserError(
                    f"{checkpoint.path}: {name} has the shape {stored.shape}; only one scale for all keys or values of "
                    "a layer is read; start from the BF16 checkpoint that it was made of"
                )
            found[f"{match[1]}.{match[3]}_scale"] = name
    return found


def _check_input_scale(packed: PackedFolder, name: str) -> None:
    """A layer whose inputs have a tensor scale must have it in the file."""
    if name not in packed.declared or packed.layers[name].input_scale is not None:
        return
    inputs = get_scheme(packed.declared[name].scheme).input
    if inputs is not None and inputs.format.tensor_scale is not None:
        raise UserError(
            f"{packed.checkpoint.path} is incomplete: the inputs of {name} are quantized in {inputs.format.name}, and "
            "their calibrated scale (input_global_scale or input_scale) is missing; pack it again"
        )


def model_of(
    checkpoint: CheckpointFolder, tensors: dict[str, torch.Tensor], trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    """The model of a packed checkpoint with plain `tensors`, all of which it must have."""
    skeleton = skeleton_of(checkpoint, trust_remote_code)

    def load() -> Any:
        return type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=tensors, dtype=VIEW_DTYPE, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs,
        )  # fmt: skip

    return load_checked(load, checkpoint.path, strict=True)


def skeleton_of(checkpoint: CheckpointFolder, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a packed checkpoint's config.json describes, unquantized, on the meta device."""
    config = read_config(checkpoint.path, checkpoint.path, trust_remote_code, local_files_only=True)
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"), fitting(checkpoint.path):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _check_own_config(packed: PackedFolder, own: QATConfig, model: nn.Module) -> None:
    """Raise a UserError where qat_config.json and the packed tensors disagree; `model` is changed."""
    folder = packed.checkpoint.path
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # messages about training
            sites = quantized_sites(prepare_as_saved(model, own))
    except UserError as error:
        raise UserError(f"{folder / QAT_CONFIG_NAME} does not fit the model in {folder}: {error}") from error
    found = {packed.parts[name].site.name: layer.format.name for name, layer in packed.layers.items()}
    check_formats(sites, found, folder)
    check_matrices(packed.checkpoint, {name: packed.parts[name].site.name for name in packed.layers}, sites)
