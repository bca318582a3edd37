"""Unpack: a packed checkpoint as a plain BF16 model, exactly, so that QAT can start from it (PTQ first, then QAT).

It reads what this program's export writes and what AutoRound and llm-compressor write: the layout of a layer is told by
its tensors, not by the configuration. A power-of-two scale makes every dequantized MXFP4 and MXFP8 value exact in BF16.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..errors import UserError
from ..layers.sites import LINEAR, find_sites
from ..numerics import ops
from ..numerics.families import get_format
from ..numerics.formats import BF16, Format, Quantized
from ..schemes.config import QATConfig
from ..schemes.presets import PRESETS, get_scheme
from ..schemes.spec import VIEW_DTYPE
from .dialects import DIALECTS, dialect_of
from .folder import CONFIG_NAME, CheckpointFolder

logger = logging.getLogger(__name__)

# Formats of weights, which their tensors tell apart, and the first scheme that has each.
_WEIGHT_FORMATS: dict[str, str] = {}
for _name, _scheme in PRESETS.items():
    _WEIGHT_FORMATS.setdefault(_scheme.weight.format.name, _name)
_KNOWN = ", ".join(_WEIGHT_FORMATS.values())
_SCALE = ".weight_scale"


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that `load_packed` should read: quantized by compressed-tensors or AutoRound."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        return False
    # As JSON: AutoConfig would ask at the terminal whether to run a folder's own code.
    quantization_config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    return method in {dialect.quant_method for dialect in DIALECTS.values()}


def load_packed(folder: str | Path) -> tuple[PreTrainedModel, QATConfig]:
    """The model in a packed checkpoint, its weights dequantized exactly, BF16, on the CPU.

    Returns:
        A plain model, and the QATConfig that describes how it was packed.

    Raises:
        UserError: the folder is damaged or incomplete, or packed in a format that is not known.
    """
    checkpoint = CheckpointFolder.open(folder)
    quantization_config = checkpoint.quantization_config or {}
    dialect_of(quantization_config, checkpoint.path)
    layers = packed_layers(checkpoint)
    plain, found = _plain_tensors(checkpoint, layers)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=plain, dtype=VIEW_DTYPE, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            problem = kind.replace("_", " ")
            raise UserError(f"{folder}: {len(names)} {problem} for {model_class.__name__}, e.g. {names[0]}")
    model.config._name_or_path = model.name_or_path = str(folder)
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    own = QATConfig.load(folder)
    config = own or _derive_config(model, found, quantization_config)
    logger.info("%s: %d packed layers dequantized to BF16", folder, len(layers))
    return model, _keep_values(model, found, config, is_ours=own is not None)


def packed_layers(checkpoint: CheckpointFolder) -> dict[str, tuple[str, str]]:
    """The packed layers of a checkpoint by module name: the names of their codes and of their scales.

    Raises:
        UserError: tensors that none of our formats has (zero points, global scales), or codes without scales.
    """
    names = checkpoint.names
    suffixes = (".weight_zero_point", ".weight_global_scale", ".qweight", ".weight_shape", ".input_global_scale")
    if other := sorted(name for name in names if name.endswith(suffixes)):
        raise UserError(f"{checkpoint.path} is packed in a format other than {_KNOWN}: it has {other[0]}")
    layers = {}
    for layer in sorted(name.removesuffix(_SCALE) for name in names if name.endswith(_SCALE)):
        packed = f"{layer}.weight_packed"
        layers[layer] = (packed if packed in names else f"{layer}.weight", f"{layer}{_SCALE}")
    expected = {codes for codes, _ in layers.values()}
    lacking = (expected - names) | {n for n in names if n.endswith(".weight_packed") and n not in expected}
    if lacking:
        raise UserError(f"{checkpoint.path} is incomplete: {sorted(lacking)[0]} or its weight_scale is missing")
    if not layers:
        raise UserError(f"{checkpoint.path} has a quantization_config, but no packed tensor (weight_scale)")
    return layers


def _plain_tensors(
    checkpoint: CheckpointFolder, layers: dict[str, tuple[str, str]]
) -> tuple[dict[str, torch.Tensor], dict[str, Format]]:
    """All tensors under the names of an unquantized checkpoint, and the formats that the packed layers had."""
    packed_names = {name for names in layers.values() for name in names}
    plain, found = {}, {}
    for file in checkpoint.shards:
        for name, tensor in checkpoint.tensors(file):
            if name not in packed_names:
                plain[name] = tensor
    for layer, names in tqdm(layers.items(), desc="Dequantizing", unit="layer"):
        codes, scale = checkpoint.read(*names)
        found[layer] = _format_of(layer, codes, scale)
        quantized = Quantized(codes.view(torch.uint8), (scale.to(found[layer].scale.storage),))
        plain[f"{layer}.weight"] = ops.dequantize(quantized, found[layer].name, VIEW_DTYPE)
    return plain, found


def _format_of(layer: str, codes: torch.Tensor, scale: torch.Tensor) -> Format:
    """Which format tensors of these dtypes and shapes are in."""
    for name in _WEIGHT_FORMATS:
        fmt = get_format(name)
        is_scale = scale.dtype == fmt.scale.storage or (fmt.scale == BF16 and scale.is_floating_point())
        if codes.ndim == 2 and codes.dtype == fmt.element.storage and is_scale:
            shape = fmt.value_shape(codes)
            if tuple(scale.shape) != fmt.scale_shape(shape):
                raise UserError(
                    f"{layer} has codes {tuple(codes.shape)} and scales {tuple(scale.shape)}; in {fmt.name} the scales "
                    f"must be {fmt.scale_shape(shape)}"
                )
            return fmt
    raise UserError(f"{layer} has codes in {codes.dtype}, scales in {scale.dtype}: no layout of {_KNOWN}")


def _derive_config(model: nn.Module, found: dict[str, Format], quantization_config: dict) -> QATConfig:
    """What `prepare_qat` must be told to quantize the same layers in the same formats."""
    # compressed-tensors stores no rule; AutoRound stores RCEIL, and no entry means FLOOR.
    suffix = "_RCEIL" if "rceil" in str(quantization_config.get("act_data_type", "")) else ""
    schemes = {layer: _WEIGHT_FORMATS[fmt.name] + suffix for layer, fmt in found.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    mapping = {LINEAR.key: common} | {layer: scheme for layer, scheme in schemes.items() if scheme != common}
    ignore = tuple(site.name for site in find_sites(model) if site.name not in found)
    return QATConfig(mapping, ignore, {name: get_scheme(name).rules for name in mapping.values()})


def _keep_values(model: nn.Module, found: dict[str, Format], config: QATConfig, is_ours: bool) -> QATConfig:
    """`config`, its weight rules changed where they would change the packed values and another would not.

    A tuner may leave a block whose largest element is 240: FLOOR reads it as 480 of the next finer scale, which
    saturates at 448. RCEIL takes the finest scale that saturates nothing. The packed scale saturates nothing, so RCEIL
    takes it or a finer one, on which every packed value lies as well: rounding again is exact, whoever packed.
    """
    rules = {get_scheme(name).weight.format.name: chosen["weight"] for name, chosen in config.scale_rules.items()}
    moved = total = 0
    for layer, fmt in found.items():
        weight = model.get_parameter(f"{layer}.weight").detach()
        rule = rules.get(fmt.name, fmt.rules[0])
        moved += int((ops.fake_quantize(weight, fmt.name, rule, VIEW_DTYPE) != weight).sum())
        total += weight.numel()
    if not moved:
        return config
    changes = (
        f"{moved} of {total} packed elements ({100 * moved / total:.3f} %) change when rounded again under {rules}"
    )
    if is_ours:  # a run must resume under the rule it was trained with
        logger.warning("%s; --quant_scheme with --weight_scale_rule rceil would keep them", changes)
        return config
    kept = {
        name: {**chosen, "weight": "rceil"} if "rceil" in get_scheme(name).weight.format.rules else chosen
        for name, chosen in config.scale_rules.items()
    }
    logger.warning("%s; without --quant_scheme MX weights are rounded under rceil, which keeps them", changes)
    return replace(config, scale_rules=kept)
