"""Unpack: a packed checkpoint as a plain BF16 model, exactly, so that QAT can start from it (PTQ first, then QAT).

It reads what this program's export writes and what AutoRound and llm-compressor write: the layout of a layer is told by
its tensors, not by the configuration. A power-of-two scale makes every dequantized MXFP4 and MXFP8 value exact in BF16.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..files.json_file import read_object
from ..files.model_folder import CONFIG_NAME, quantizer_of
from ..layers import learned_scales
from ..layers.sites import LINEAR, find_sites
from ..numerics import ops
from ..numerics.formats import Format, Quantized
from ..schemes.config import QATConfig
from ..schemes.presets import get_scheme
from ..schemes.spec import VIEW_DTYPE
from .dialects import DIALECTS
from .fit import check_finite
from .folder import CheckpointFolder
from .packed_folder import WEIGHT_FORMATS, PackedLayer, check_packed, check_scale, model_of
from .skeleton import untie_if_different

logger = logging.getLogger(__name__)


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that `load_packed` should read: quantized by compressed-tensors or AutoRound.

    Raises:
        UserError: its config.json is damaged.
    """
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        return False
    # As JSON: AutoConfig would ask at the terminal whether to run a folder's own code.
    return quantizer_of(Path(folder), read_object(path)) in {dialect.quant_method for dialect in DIALECTS.values()}


def load_packed(
    folder: str | Path, argument: str = "the packed folder", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, QATConfig]:
    """The model in a packed checkpoint, its weights dequantized exactly, BF16, on the CPU.

    Args:
        argument: by which argument the user named the folder, for messages.
        trust_remote_code: run Python code that comes with it.

    Returns:
        A plain model, and the QATConfig that describes how it was packed.

    Raises:
        UserError: see `check_packed`; or a tensor holds NaN or infinity.
    """
    checkpoint, layers, own = check_packed(folder, argument, trust_remote_code)
    plain = _plain_tensors(checkpoint, layers)
    model = model_of(checkpoint, plain, trust_remote_code)
    check_finite(model.named_parameters(), checkpoint.path)
    untie_if_different(model)
    model.config._name_or_path = model.name_or_path = str(folder)
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    found = {name: layer.format for name, layer in layers.items()}
    config = own or _derive_config(model, found, checkpoint.quantization_config or {})
    logger.info("%s: %d packed layers dequantized to BF16", folder, len(layers))
    return model, _keep_values(model, found, config, is_ours=own is not None)


def _plain_tensors(checkpoint: CheckpointFolder, layers: dict[str, PackedLayer]) -> dict[str, torch.Tensor]:
    """All tensors under the names of an unquantized checkpoint."""
    packed_names = {name for layer in layers.values() for name in (layer.codes, layer.scale)}
    plain = {}
    for file in checkpoint.shards:
        for name, tensor in checkpoint.tensors(file):
            if name not in packed_names:
                plain[name] = tensor
    for name, layer in tqdm(layers.items(), desc="Dequantizing", unit="layer"):
        codes, scale = checkpoint.read(layer.codes, layer.scale)
        check_scale(layer.scale, scale, layer.format, checkpoint.path)
        quantized = Quantized(codes.view(torch.uint8), (scale.to(layer.format.scale.storage),))
        plain[f"{name}.weight"] = ops.dequantize(quantized, layer.format.name, VIEW_DTYPE)
    return plain


def _derive_config(model: nn.Module, found: dict[str, Format], quantization_config: dict) -> QATConfig:
    """What `prepare_qat` must be told to quantize the same layers in the same formats."""
    # compressed-tensors stores no rule; AutoRound stores RCEIL, and no entry means FLOOR.
    suffix = "_RCEIL" if "rceil" in str(quantization_config.get("act_data_type", "")) else ""
    schemes = {layer: WEIGHT_FORMATS[fmt.name] + suffix for layer, fmt in found.items()}
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
    if config.training.get(learned_scales.SETTING):  # layers compute with the values as they are
        return config
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
