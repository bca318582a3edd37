"""Unpack: a packed MX checkpoint as a plain BF16 model, exactly, so that QAT can start from it (PTQ first, then QAT).

It reads what this program's export writes and what AutoRound and llm-compressor write: the layout of a layer is told by
its tensors, not by the configuration. A power-of-two scale makes every dequantized MXFP4 and MXFP8 value exact in BF16.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..numerics import ops
from ..numerics.formats import BLOCK_SIZE
from ..schemes.config import QATConfig
from ..schemes.spec import get_scheme
from .dialects.compressed_tensors import export_format_of
from .folder import CONFIG_NAME, CheckpointFolder
from .pack import VIEW_DTYPE

logger = logging.getLogger(__name__)

_SCALE = ".weight_scale"


@dataclass(frozen=True)
class PackedLayer:
    """Where one packed layer lies: the tensor of its codes, and the bits of one."""

    codes_name: str
    bits: int


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that `load_packed` should read: quantized by compressed-tensors or AutoRound."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        return False
    # As JSON: AutoConfig would ask at the terminal whether to run a folder's own code.
    quantization_config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    return method in ("compressed-tensors", "auto-round")


def load_packed(folder: str | Path) -> PreTrainedModel:
    """The model in a packed checkpoint, its weights dequantized exactly, BF16, on the CPU.

    Returns:
        A plain model; `model.packed_qat_config` is the QATConfig that describes how it was packed.

    Raises:
        ValueError: the folder is damaged or incomplete, or packed in another format than MXFP4 or MXFP8.
    """
    checkpoint = CheckpointFolder.open(folder)
    export_format_of(checkpoint.quantization_config, checkpoint.path)
    layers = packed_layers(checkpoint)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=_plain_tensors(checkpoint, layers), dtype=VIEW_DTYPE, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            problem = kind.replace("_", " ")
            raise ValueError(f"{folder}: {len(names)} {problem} for {model_class.__name__}, e.g. {names[0]}")
    model.config._name_or_path = model.name_or_path = str(folder)
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    own = QATConfig.load(folder)
    config = own or _derive_config(model, layers, checkpoint.quantization_config)
    logger.info("%s: %d packed layers dequantized to BF16", folder, len(layers))
    model.packed_qat_config = _keep_values(model, layers, config, is_ours=own is not None)
    return model


def packed_layers(checkpoint: CheckpointFolder) -> dict[str, PackedLayer]:
    """The packed layers of a checkpoint by module name.

    Raises:
        ValueError: tensors that no MX layout has (zero points, global scales), or codes without scales.
    """
    names = checkpoint.names
    suffixes = (".weight_zero_point", ".weight_global_scale", ".qweight", ".weight_shape", ".input_global_scale")
    if foreign := sorted(name for name in names if name.endswith(suffixes)):
        raise ValueError(f"{checkpoint.path} is packed in a format other than MXFP4 or MXFP8: it has {foreign[0]}")
    layers = {}
    for layer in sorted(name.removesuffix(_SCALE) for name in names if name.endswith(_SCALE)):
        packed = f"{layer}.weight_packed"
        layers[layer] = PackedLayer(packed, 4) if packed in names else PackedLayer(f"{layer}.weight", 8)
    expected = {layer.codes_name for layer in layers.values()}
    lacking = (expected - names) | {n for n in names if n.endswith(".weight_packed") and n not in expected}
    if lacking:
        raise ValueError(f"{checkpoint.path} is incomplete: {sorted(lacking)[0]} or its weight_scale is missing")
    if not layers:
        raise ValueError(f"{checkpoint.path} has a quantization_config, but no packed tensor (weight_scale)")
    return layers


def _plain_tensors(checkpoint: CheckpointFolder, layers: dict[str, PackedLayer]) -> dict[str, torch.Tensor]:
    """All tensors under the names of an unquantized checkpoint."""
    packed_names = {layer.codes_name for layer in layers.values()} | {f"{name}{_SCALE}" for name in layers}
    plain = {}
    for file in checkpoint.shards:
        for name, tensor in checkpoint.tensors(file):
            if name not in packed_names:
                plain[name] = tensor
    for name, layer in tqdm(layers.items(), desc="Dequantizing", unit="layer"):
        plain[f"{name}.weight"] = _dequantize(name, *checkpoint.read(layer.codes_name, f"{name}{_SCALE}"), layer.bits)
    return plain


def _dequantize(name: str, codes: torch.Tensor, scale_e8m0_biased: torch.Tensor, bits: int) -> torch.Tensor:
    values = codes.shape[-1] * 8 // bits
    code_dtype = torch.uint8 if bits == 4 else torch.float8_e4m3fn
    if codes.dtype != code_dtype or scale_e8m0_biased.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"{name} has codes in {codes.dtype}, scales in {scale_e8m0_biased.dtype}: no MX layout")
    if scale_e8m0_biased.shape != (codes.shape[0], values // BLOCK_SIZE):
        raise ValueError(
            f"{name} has codes {tuple(codes.shape)} and scales {tuple(scale_e8m0_biased.shape)}; in MXFP{bits} the "
            f"scales must be {(codes.shape[0], values // BLOCK_SIZE)}"
        )
    return ops.dequantize(codes.view(torch.uint8), scale_e8m0_biased, f"mxfp{bits}", VIEW_DTYPE)


def _derive_config(model: nn.Module, layers: dict[str, PackedLayer], quantization_config: dict) -> QATConfig:
    """What `prepare_qat` must be told to quantize the same layers in the same formats."""
    # compressed-tensors names no rule; AutoRound names RCEIL, or FLOOR by saying nothing.
    suffix = "_RCEIL" if "rceil" in str(quantization_config.get("act_data_type", "")) else ""
    common = Counter(layer.bits for layer in layers.values()).most_common(1)[0][0]
    mapping = {"torch.nn.Linear": f"MXFP{common}{suffix}"}
    mapping |= {name: f"MXFP{layer.bits}{suffix}" for name, layer in layers.items() if layer.bits != common}
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    ignore = tuple(name for name in linear if name not in layers)
    schemes = {name: get_scheme(name) for name in mapping.values()}
    rules = {n: {"weight": s.weight.scale_rule, "input": s.input.scale_rule} for n, s in schemes.items()}
    return QATConfig(mapping=mapping, ignore=ignore, scale_rules=rules)


def _keep_values(model: nn.Module, layers: dict[str, PackedLayer], config: QATConfig, is_ours: bool) -> QATConfig:
    """`config`, its weight rule changed to RCEIL where its own would change the packed values.

    A tuner may leave a block whose largest element is 240: FLOOR reads it as 480 of the next finer scale, which
    saturates at 448. RCEIL takes the finest scale that saturates nothing. The packed scale saturates nothing, so RCEIL
    takes it or a finer one, on which every packed value lies as well: rounding again is exact, whoever packed.
    """
    rules = {name[:5].lower(): chosen["weight"] for name, chosen in config.scale_rules.items()}
    moved = total = 0
    for name, layer in layers.items():
        weight, fmt = model.get_submodule(name).weight.detach(), f"mxfp{layer.bits}"
        moved += int((ops.fake_quantize(weight, fmt, rules.get(fmt, "floor"), VIEW_DTYPE) != weight).sum())
        total += weight.numel()
    if not moved:
        return config
    said = f"{moved} of {total} packed elements ({100 * moved / total:.3f} %) change when rounded again under {rules}"
    if is_ours:  # a run must continue under the rule it was trained with
        logger.warning("%s; --quant_scheme with --weight_scale_rule rceil would keep them", said)
        return config
    logger.warning("%s; without --quant_scheme their weights are rounded under rceil, which keeps them", said)
    return replace(config, scale_rules={n: {**chosen, "weight": "rceil"} for n, chosen in config.scale_rules.items()})
