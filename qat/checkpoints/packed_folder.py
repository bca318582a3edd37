"""What a packed folder holds, by its headers: the layers, their formats, and whether anything is missing.

The layout of a layer is told by its tensors, not by the configuration, so folders of other programs are read as well.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..layers.restore import prepare_as_saved
from ..layers.sites import quantized_sites
from ..numerics.families import get_format
from ..numerics.formats import BF16, E8M0, Format
from ..schemes.config import QAT_CONFIG_NAME, QATConfig
from ..schemes.presets import PRESETS
from ..schemes.spec import VIEW_DTYPE
from .dialects import dialect_of
from .fit import check_dtypes, check_finite, is_finite, load_checked
from .folder import CheckpointFolder, Stored
from .model_config import read_config

# Formats of weights, which their tensors tell apart, and the first scheme that has each.
WEIGHT_FORMATS: dict[str, str] = {}
for _name, _scheme in PRESETS.items():
    WEIGHT_FORMATS.setdefault(_scheme.weight.format.name, _name)
_KNOWN = ", ".join(WEIGHT_FORMATS.values())
_SCALE = ".weight_scale"
_E8M0_NAN = 255
_FLOATS = ("F16", "BF16", "F32", "F64")
_STORED_AS = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class PackedLayer:
    """A layer whose weight is stored in codes and scales.

    Attributes:
        codes, scale: names of its tensors.
        format: that they are in.
        shape: of the weight.
    """

    codes: str
    scale: str
    format: Format
    shape: tuple[int, ...]


def check_packed(
    folder: str | Path, argument: str = "the packed folder", trust_remote_code: bool = False
) -> tuple[CheckpointFolder, dict[str, PackedLayer], QATConfig | None]:
    """Open a packed checkpoint and refuse one that lacks anything, by its headers alone.

    Returns:
        The folder, its packed layers by name, and its own qat_config.json; None where it has none.

    Raises:
        UserError: the folder is damaged or incomplete, packed in a format that is not known, or in another than its
            qat_config.json says.
    """
    checkpoint = CheckpointFolder.open(folder, argument)
    dialect_of(checkpoint.quantization_config, checkpoint.path)
    layers = packed_layers(checkpoint)
    packed_names = {name for layer in layers.values() for name in (layer.codes, layer.scale)}
    stored = {name: tensor for name, tensor in checkpoint.stored.items() if name not in packed_names}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    shapes |= {f"{name}.weight": layer.shape for name, layer in layers.items()}
    empty = {name: torch.empty(shape, dtype=VIEW_DTYPE, device="meta") for name, shape in shapes.items()}
    model = model_of(checkpoint, empty, trust_remote_code, device_map="meta")
    check_dtypes(stored, model, checkpoint.path)
    own = QATConfig.load(folder)
    if own is not None:
        _check_own_config(own, model, layers, checkpoint.path)
    return checkpoint, layers, own


def check_packed_values(
    folder: str | Path, argument: str = "the packed folder", trust_remote_code: bool = False
) -> None:
    """`check_packed`, and a UserError for scales, codes or other tensors that are NaN or infinite."""
    checkpoint, layers, _ = check_packed(folder, argument, trust_remote_code)
    formats = {layer.scale: layer.format for layer in layers.values()}
    for file in checkpoint.shards:
        for name, tensor in checkpoint.tensors(file):
            if name in formats:
                check_scale(name, tensor, formats[name], checkpoint.path)
            else:
                check_finite([(name, tensor)], checkpoint.path)


def model_of(
    checkpoint: CheckpointFolder, tensors: dict[str, torch.Tensor], trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    """The model of a packed checkpoint with plain `tensors`, all of which it must have."""
    config = read_config(checkpoint.path, checkpoint.path, trust_remote_code, local_files_only=True)
    del config.quantization_config

    def load() -> Any:
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        return model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=VIEW_DTYPE, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs,
        )  # fmt: skip

    return load_checked(load, checkpoint.path, strict=True)


def _check_own_config(own: QATConfig, model: nn.Module, layers: dict[str, PackedLayer], folder: Path) -> None:
    """Raise a UserError where qat_config.json and the packed tensors disagree; `model` is changed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # messages about training
            sites = quantized_sites(prepare_as_saved(model, own))
    except UserError as error:
        raise UserError(f"{folder / QAT_CONFIG_NAME} does not fit the model in {folder}: {error}") from error
    said = {site.name: site.scheme.weight.format.name for site in sites}
    for name in sorted({*said, *layers}):
        found = layers[name].format.name if name in layers else "no packed format"
        if found != said.get(name, "no packed format"):
            raise UserError(
                f"{folder / QAT_CONFIG_NAME} contradicts the weights in {folder}: {name} is packed in {found}, and it "
                f"says {said.get(name, 'that the layer is not quantized')}; restore the file that was exported, or "
                "remove it to take the formats of the weights"
            )


def packed_layers(checkpoint: CheckpointFolder) -> dict[str, PackedLayer]:
    """The packed layers of a checkpoint by module name.

    Raises:
        UserError: tensors that none of our formats has (zero points, global scales), or codes without scales.
    """
    stored = checkpoint.stored
    names = set(stored)
    suffixes = (".weight_zero_point", ".weight_global_scale", ".qweight", ".weight_shape", ".input_global_scale")
    if other := sorted(name for name in names if name.endswith(suffixes)):
        raise UserError(f"{checkpoint.path} is packed in a format other than {_KNOWN}: it has {other[0]}")
    pairs = {}
    for layer in sorted(name.removesuffix(_SCALE) for name in names if name.endswith(_SCALE)):
        packed = f"{layer}.weight_packed"
        pairs[layer] = (packed if packed in names else f"{layer}.weight", f"{layer}{_SCALE}")
    expected = {codes for codes, _ in pairs.values()}
    lacking = (expected - names) | {n for n in names if n.endswith(".weight_packed") and n not in expected}
    if lacking:
        raise UserError(f"{checkpoint.path} is incomplete: {sorted(lacking)[0]} or its weight_scale is missing")
    if not pairs:
        raise UserError(f"{checkpoint.path} has a quantization_config, but no packed tensor (weight_scale)")
    layers = {}
    for layer, (codes, scale) in pairs.items():
        fmt = _format_of(checkpoint.path, layer, stored[codes], stored[scale])
        layers[layer] = PackedLayer(codes, scale, fmt, _value_shape(fmt, stored[codes]))
    return layers


def check_scale(name: str, scale: torch.Tensor, fmt: Format, where: object) -> None:
    """Raise a UserError for scales that are NaN, infinite or, in E8M0, the byte 255, which is NaN."""
    broken = int(scale.max()) == _E8M0_NAN if fmt.scale == E8M0 else not is_finite(scale)
    if broken:
        raise UserError(f"{where}: {name} holds scales that are NaN or infinite; export or copy the checkpoint again")


def _format_of(where: object, layer: str, codes: Stored, scale: Stored) -> Format:
    """Which format tensors of these dtypes and shapes are in."""
    for name in WEIGHT_FORMATS:
        fmt = get_format(name)
        is_scale = scale.dtype == _STORED_AS.get(fmt.scale.storage) or (fmt.scale == BF16 and scale.dtype in _FLOATS)
        if len(codes.shape) == 2 and codes.dtype == _STORED_AS.get(fmt.element.storage) and is_scale:
            expected = fmt.scale_shape(_value_shape(fmt, codes))
            if scale.shape != tuple(expected):
                raise UserError(
                    f"{where}: {layer} has codes {codes.shape} and scales {scale.shape}; in {fmt.name} the scales must "
                    f"be {tuple(expected)}"
                )
            return fmt
    raise UserError(f"{where}: {layer} has codes in {codes.dtype}, scales in {scale.dtype}: no layout of {_KNOWN}")


def _value_shape(fmt: Format, codes: Stored) -> tuple[int, ...]:
    return tuple(fmt.value_shape(torch.empty(codes.shape, dtype=fmt.element.storage, device="meta")))
