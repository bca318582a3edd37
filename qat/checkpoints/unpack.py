"""Unpack: a packed checkpoint as a plain BF16 model, exactly, so that QAT can start from it (PTQ first, then QAT).

It reads what this program's export writes, and what AutoRound, llm-compressor and Model-Optimizer write: layouts.py has
the tensors, settings.py the words for what is quantized.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..errors import UserError
from ..files.json_file import read_object
from ..files.model_folder import CONFIG_NAME, quantizer_of
from ..layers.calibration import DIVISOR
from ..layers.fused import fused_groups
from ..layers.kv_cache import cache_layers
from ..layers.sites import EXPERTS, LINEAR, find_sites
from ..schemes.config import QAT_CONFIG_NAME, QATConfig
from ..schemes.presets import get_scheme
from .fit import check_finite
from .folder import READ_METHODS
from .input_transforms import check_matrix_values
from .kept_values import PackedRows, keep_values
from .layouts import dequantize, engines_divisor, input_divisor
from .packed_folder import PackedFolder, check_packed, model_of
from .packed_sites import schemes_of_modules
from .skeleton import untie_if_different

logger = logging.getLogger(__name__)


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that `load_packed` should read: quantized by a method that is read.

    Raises:
        UserError: its config.json is damaged.
    """
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        return False
    # As JSON: AutoConfig would ask at the terminal whether to run a folder's own code.
    return quantizer_of(Path(folder), read_object(path)) in READ_METHODS


def load_packed(
    folder: str | Path,
    argument: str = "the packed folder",
    trust_remote_code: bool = False,
    rounds_again: bool = True,
) -> tuple[PreTrainedModel, QATConfig]:
    """The model in a packed checkpoint, its weights dequantized exactly, BF16, on the CPU.

    Where inputs are transformed the weights are those for transformed inputs, to be computed with as they are.

    Args:
        argument: by which argument the user named the folder, for messages.
        trust_remote_code: run Python code that comes with it.
        rounds_again: whether its weights are going to be rounded by a rule, as in training; how far that moves them is
            then logged.

    Returns:
        A plain model, and the QATConfig that describes how it was packed.

    Raises:
        UserError: see `check_packed`; or a tensor holds NaN or infinity.
    """
    packed = check_packed(folder, argument, trust_remote_code, allows_transforms=not rounds_again)
    checkpoint, divisors = packed.checkpoint, {}
    check_matrix_values(checkpoint)
    plain = dict(packed.plain_tensors())
    with checkpoint.reading() as read:
        for name, layer in tqdm(packed.layers.items(), desc="Dequantizing", unit="layer"):
            tensors = packed.tensors_of(name, read)
            packed.parts[name].put(dequantize(layer, tensors), plain)
            if layer.input_scale is not None:
                divisors[name] = input_divisor(layer, tensors[layer.input_scale.rpartition(".")[2]])
    model = model_of(checkpoint, plain, trust_remote_code)
    check_finite(model.named_parameters(), checkpoint.path)
    untie_if_different(model)
    model.config._name_or_path = model.name_or_path = str(folder)
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    logger.info("%s: %d packed layers dequantized to BF16", folder, len(packed.layers))
    if packed.own is None:
        config = _derive_config(model, packed, divisors)
    else:
        config = packed.own
        for name, divisor in divisors.items():
            _check_scale(config, f"{packed.parts[name].site.label}.{DIVISOR}", divisor, checkpoint.path)
        for name, scale in _stored_key_value_scales(packed).items():
            _check_scale(config, name, scale, checkpoint.path)
    if not rounds_again:
        return model, config
    with checkpoint.reading() as read:
        rows = PackedRows(packed.layers, lambda name: packed.tensors_of(name, read))
        return model, keep_values(rows, config, is_ours=packed.own is not None)


def _check_scale(own: QATConfig, name: str, found: float, folder: Path) -> None:
    """Raise a UserError where qat_config.json has another calibrated scale than a tensor of the folder."""
    if (said := own.calibrated_scales.get(name)) != found:
        raise UserError(
            f"{folder / QAT_CONFIG_NAME} contradicts the scales in {folder}: {name} is {found}, and it "
            f"says {said}; export or copy the checkpoint again"
        )


def _derive_config(model: nn.Module, packed: PackedFolder, divisors: Mapping[str, float]) -> QATConfig:
    """What `prepare_qat` must be told to quantize the same layers in the same formats."""
    schemes = schemes_of_modules(packed.parts, packed.declared, packed.checkpoint.path)
    common = Counter(schemes.values()).most_common(1)[0][0]
    mapping = {LINEAR.key: common} | {layer: scheme for layer, scheme in schemes.items() if scheme != common}
    ignore = tuple(dict.fromkeys(site.name for site in find_sites(model) if site.name not in schemes))
    rules = {name: get_scheme(name).rules for name in mapping.values()}
    if replaced := sum(said.per_tensor_inputs for said in packed.declared.values()):
        logger.warning(
            "%s: the inputs of %d layers have one FP8 scale for the whole tensor; here they are quantized under one "
            "scale for each token (FP8)", packed.checkpoint.path, replaced,
        )  # fmt: skip
    calibrated = _input_scales(packed, divisors) | _key_value_scales(model, packed)
    cache = "FP8" if packed.caches_fp8 else None
    return QATConfig(mapping, ignore, rules, calibrated_scales=calibrated, kv_cache_scheme=cache)


def _input_scales(packed: PackedFolder, divisors: Mapping[str, float]) -> dict[str, float]:
    """The calibrated divisors of inputs that have one, as engines take them: one for layers that they fuse."""
    inputs = {name: get_scheme(said.scheme).input for name, said in packed.declared.items()}
    needed = [name for name, spec in inputs.items() if spec is not None and spec.format.tensor_scale is not None]
    taken = {name: divisors[name] for name in needed}
    for group in _of_one_input(packed, needed):
        together = _together(packed, group, [divisors[name] for name in group])
        if moved := [name for name in group if divisors[name] != together]:
            logger.warning(
                "%s: layers that engines fuse have several scales for one input; all of them take %s, not %s as %s",
                packed.checkpoint.path, together, divisors[moved[0]], moved[0],
            )  # fmt: skip
        taken |= dict.fromkeys(group, together)
    return {f"{packed.parts[name].site.label}.{DIVISOR}": value for name, value in taken.items()}


def _of_one_input(packed: PackedFolder, names: list[str]) -> list[list[str]]:
    """Those of some layers that engines quantize one input for: layers that they fuse, and the experts of a module."""
    experts: dict[str, list[str]] = {}
    for name in names:
        if packed.parts[name].site.kind == EXPERTS.name:
            experts.setdefault(packed.parts[name].site.label, []).append(name)
    linear = [name for name in names if packed.parts[name].site.kind != EXPERTS.name]
    return [*fused_groups(linear), *experts.values()]


def _together(packed: PackedFolder, group: list[str], divisors: list[float]) -> float:
    """The divisor of layers with one input; of experts vLLM takes the one with which none of them saturates."""
    if packed.parts[group[0]].site.kind == EXPERTS.name:
        return min(divisors)
    return engines_divisor(packed.layers[group[0]], divisors)


def _key_value_scales(model: nn.Module, packed: PackedFolder) -> dict[str, float]:
    """The calibrated scales of the key/value cache; one that is missing is 1, as in engines."""
    if not packed.caches_fp8:
        if packed.key_value_scales:
            logger.warning(
                "%s has %d scales of a key/value cache, and its settings have no kv_cache_scheme; they are not used",
                packed.checkpoint.path, len(packed.key_value_scales),
            )  # fmt: skip
        return {}
    found = _stored_key_value_scales(packed)
    names = [quantizer for layer in cache_layers(model) for quantizer in (f"{layer}.k_scale", f"{layer}.v_scale")]
    if missing := [name for name in names if name not in found]:
        logger.warning(
            "%s caches keys and values in FP8 and lacks %d of their scales, which are 1, as engines take them: %s",
            packed.checkpoint.path, len(missing), missing[0],
        )  # fmt: skip
    return {name: found.get(name, 1.0) for name in names}


def _stored_key_value_scales(packed: PackedFolder) -> dict[str, float]:
    return {name: float(packed.checkpoint.read(stored)[0].float()) for name, stored in packed.key_value_scales.items()}
