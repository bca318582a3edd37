"""Settings: what the quantization_config of a packed folder says of a layer that its tensors do not tell.

The tensors tell in which format a weight is. Whether inputs are quantized, and in which format, stands in the settings
alone: MXFP4's tensors are the same with inputs in MXFP4, in FP8, or in none. Each program has its own words for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_file import read_object, shown
from ..files.model_folder import HF_QUANT_CONFIG, quantizer_of
from ..numerics.families import formats
from ..numerics.formats import Format
from ..schemes.patterns import EXPRESSION, matches
from ..schemes.presets import PRESETS
from .dialects.compressed_tensors import LAYOUT_NAMES, quantization_args
from .dialects.mxfp4 import FORMAT as NATIVE
from .layouts import REMEDY

_PER_TENSOR = "fp8_tensor"  # inputs in FP8 with one scale, which no scheme has
_LINEAR = "Linear"
# Model-Optimizer's algorithms: the formats of weights and of inputs.
_ALGORITHMS: dict[str, tuple[str, str | None]] = {
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "FP8": ("fp8_channel", _PER_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_token"),
}
_MIXED = "MIXED_PRECISION"
# AutoRound's arrangements of tensors; a folder without a name for it has compressed-tensors' FP8.
_ARRANGEMENTS = (None, "auto_round:llm_compressor", "auto_round:auto_gptq", "auto_gptq", "auto_round:fp8_static",
                 "auto_round:fp8")  # fmt: skip
# What the settings say of a layer with a weight in a format: the format of its inputs, and how its preset's name ends.
_Read = Callable[[str, Format], tuple[str | None, str]]


def read_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings of a packed folder; Model-Optimizer may have them in a file beside config.json.

    Returns:
        The settings, their method under "quant_method".

    Raises:
        UserError: the file is damaged.
    """
    method = quantizer_of(folder, dict(config))
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None and (folder / HF_QUANT_CONFIG).is_file():
        settings = read_object(folder / HF_QUANT_CONFIG)
    settings = settings or {}
    inner = settings.get("quantization")
    return {**(inner if isinstance(inner, dict) else settings), "quant_method": method}


def check_settings(settings: Mapping[str, Any], where: object) -> None:
    """Raise a UserError for what the settings say of the whole folder and this program does not read, by name."""
    method = settings["quant_method"]
    for key in ("transform_config", "rotation_config", "sparsity_config"):
        if (found := settings.get(key)) and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise _refusal(where, method, f"with a {key}, which changes what its layers compute,")
    if method == "modelopt":
        algorithm = settings.get("quant_algo")
        if str(algorithm) not in (*_ALGORITHMS, _MIXED):
            raise _refusal(where, method, f"as quant_algo {shown(algorithm)} (read are {', '.join(_ALGORITHMS)}),")
    elif method == NATIVE:
        return  # its settings name modules that it does not hold anyway
    elif method == "auto-round":
        if (arrangement := settings.get("packing_format")) not in _ARRANGEMENTS:
            raise _refusal(where, method, f"in the packing_format {shown(arrangement)},")
        if settings.get("sym") is False:
            raise _refusal(where, method, "with zero points (sym false),")
    else:
        for name in (settings.get("format"), *(group.get("format") for group in _groups(settings, where))):
            if name not in (None, "mixed-precision", *LAYOUT_NAMES):
                raise _refusal(where, method, f"in its format {shown(name)} (read are {', '.join(LAYOUT_NAMES)}),")


def _refusal(where: object, method: str, how: str) -> UserError:
    return UserError(f"{where} is quantized by {method} {how} which is not read; {REMEDY}".replace(",,", ","))


@dataclass(frozen=True)
class Declared:
    """What the settings say of a layer.

    Attributes:
        scheme: the preset with these formats.
        per_tensor_inputs: whether its inputs had one FP8 scale for the whole tensor, which no scheme has; that of
            `scheme` is one for each token.
    """

    scheme: str
    per_tensor_inputs: bool


def declared(settings: Mapping[str, Any], layers: Mapping[str, Format], where: object) -> dict[str, Declared]:
    """The schemes of layers: the preset that has the format of a layer's weight and the inputs that the settings name.

    Args:
        layers: the formats of their weights, as their tensors tell, by name.

    Raises:
        UserError: the settings contradict the tensors, name inputs that no scheme has, or say nothing of a layer.
    """
    readers = {"modelopt": _of_model_optimizer, "auto-round": _of_auto_round, NATIVE: _of_native}
    read = readers.get(settings["quant_method"], _of_compressed_tensors)(settings, where)
    return {layer: _scheme(layer, fmt, *read(layer, fmt), where) for layer, fmt in layers.items()}


def _scheme(layer: str, fmt: Format, inputs: str | None, suffix: str, where: object) -> Declared:
    is_replaced = inputs == _PER_TENSOR and fmt.name == "fp8_channel"
    wanted = "fp8_token" if is_replaced else inputs
    for name, scheme in PRESETS.items():
        if (scheme.weight.format, scheme.input and scheme.input.format.name) == (fmt, wanted):
            return Declared(name + suffix if name + suffix in PRESETS else name, is_replaced)
    raise UserError(
        f"{where}: {layer} has weights in {fmt.name} and inputs in {inputs or 'no format'}, and no scheme has both; "
        f"{REMEDY}"
    )


def has_key_value_scheme(settings: Mapping[str, Any], where: object) -> bool:
    """Whether keys and values are cached in FP8 under calibrated scales.

    Raises:
        UserError: they are cached in another format.
    """
    found = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    if found is None:
        return False
    if isinstance(found, dict):
        is_fp8 = (found.get("num_bits"), found.get("type"), found.get("dynamic", False)) == (8, "float", False)
        is_fp8 = is_fp8 and found.get("strategy", "tensor") == "tensor"
    else:
        is_fp8 = found == "FP8"
    if not is_fp8:
        raise UserError(
            f"{where} has the key/value cache in {shown(found)}; FP8 with a scale for each tensor is read; {REMEDY}"
        )
    return True


def _object(settings: Mapping[str, Any], key: str, where: object) -> dict[str, Any]:
    """An object inside the settings; an empty one where there is none."""
    found = settings.get(key)
    if found is not None and not isinstance(found, dict):
        raise UserError(
            f"{where}: {key} of its quantization settings is {shown(found)}, no object; copy or pack it again"
        )
    return found or {}


# ---- compressed-tensors ----


def _groups(settings: Mapping[str, Any], where: object) -> list[dict[str, Any]]:
    groups = _object(settings, "config_groups", where)
    return [_object(groups, name, where) for name in groups]


def _of_compressed_tensors(settings: Mapping[str, Any], where: object) -> _Read:
    group_of = _by_target(_groups(settings, where))
    known = {_kind(quantization_args(f, dynamic=True)): f.name for f in formats().values() if f.input_rules}
    known[8, "float", "tensor", None] = _PER_TENSOR

    def read(layer: str, fmt: Format) -> tuple[str | None, str]:
        group = group_of(layer)
        if group is None:
            raise UserError(f"{where}: {layer} is packed, and no target of its config_groups matches it; pack it again")
        weights, inputs = (_object(group, key, where) for key in ("weights", "input_activations"))
        _check_weights(weights, fmt, f"{where}: {layer}")
        if group.get("input_activations") is None:
            return None, ""
        kind = _kind(inputs)
        found = next((name for other, name in known.items() if other == kind), None)  # JSON may not be hashable
        if found is None or not inputs.get("symmetric", True):
            raise UserError(f"{where}: {layer} has inputs in {shown(inputs)}, which no scheme has; {REMEDY}")
        return found, ""

    return read


def _by_target(groups: list[dict[str, Any]]) -> Callable[[str], dict[str, Any] | None]:
    """What finds the group that names a layer, else the one that names its class. Targets may be tens of thousands."""
    named: dict[str, int] = {}  # the first group with a target
    for number, group in enumerate(groups):
        for target in found if isinstance(found := group.get("targets"), list) else ():
            named.setdefault(str(target), number)
    expressions = [(number, target) for target, number in named.items() if target.startswith(EXPRESSION)]

    def find(layer: str) -> dict[str, Any] | None:
        numbers = [number for number, target in expressions if matches(layer, target)]
        if layer in named:
            numbers.append(named[layer])
        number = min(numbers, default=named.get(_LINEAR))
        return None if number is None else groups[number]

    return find


def _kind(arguments: Mapping[str, Any]) -> tuple:
    """Bits, type, strategy and group size."""
    size = arguments.get("group_size") or None
    return arguments.get("num_bits"), arguments.get("type"), _strategy(arguments), size


def _strategy(arguments: Mapping[str, Any]) -> str:
    """As compressed-tensors reads it where it is left out."""
    size = arguments.get("group_size")
    return arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")


def _check_weights(weights: Mapping[str, Any], fmt: Format, where: str) -> None:
    """Refuse settings that say another format than the tensors do."""
    expected = quantization_args(fmt, dynamic=False)
    found = {"num_bits": weights.get("num_bits"), "type": weights.get("type"), "strategy": _strategy(weights)}
    found |= {"group_size": weights.get("group_size"), "symmetric": weights.get("symmetric", True)}
    for key, value in found.items():
        choices = [expected.get(key)]
        if key == "strategy" and fmt.block is None:
            choices = ["channel", "tensor"]
        elif key == "group_size" and fmt.block is None:
            choices = [None, -1]
        if value not in choices:
            raise UserError(
                f"{where} is said to have weights of {key} {shown(value)}; {fmt.name}, as its tensors are, has "
                f"{' or '.join(map(repr, choices))}; {REMEDY}"
            )


# ---- AutoRound ----


def _of_auto_round(settings: Mapping[str, Any], where: object) -> _Read:
    exception_of = _exceptions(_object(settings, "extra_config", where))
    return lambda layer, fmt: _read_auto_round({**settings, **exception_of(layer)}, layer, fmt, where)


def _read_auto_round(own: dict[str, Any], layer: str, fmt: Format, where: object) -> tuple[str | None, str]:
    for key, expected in (("sym", True), ("bits", fmt.element.bits)):
        if own.get(key, expected) != expected:
            raise UserError(
                f"{where}: {layer} is said to have weights of {key} {shown(own[key])}, and in {fmt.name} it is "
                f"{expected}; {REMEDY}"
            )
    kind = str(own.get("data_type", fmt.data_type))
    if not kind.startswith(fmt.data_type):
        raise UserError(f"{where}: {layer} has weights in AutoRound's {kind}, which is not read; {REMEDY}")
    bits = own.get("act_bits") or 16
    if isinstance(bits, int) and bits > 8:
        return None, ""
    inputs = str(own.get("act_data_type") or kind)
    size = own.get("act_group_size", own.get("group_size"))
    suffix = "_RCEIL" if "rceil" in inputs else ""
    is_dynamic = own.get("act_dynamic", True)
    named = {("mx_fp", 4, 32): "mxfp4", ("mx_fp", 8, 32): "mxfp8", ("nv_fp", 4, 16): "nvfp4"}
    if inputs.startswith("fp"):
        named |= {("fp", 8, -1): "fp8_token" if is_dynamic else _PER_TENSOR, ("fp", 8, 0): _PER_TENSOR}
        named |= {("fp", 8, 128): "fp8_g128"}
    found = next((name for (data, width, block), name in named.items()
                  if inputs.startswith(data) and (bits, size) == (width, block)), None)  # fmt: skip
    if found is None or own.get("act_sym", True) is False:
        raise UserError(
            f"{where}: {layer} has inputs in AutoRound's {inputs} of {bits} bits in groups of {size}, which no scheme "
            f"has; {REMEDY}"
        )
    return found, suffix


def _exceptions(found: Mapping[str, Any]) -> Callable[[str], dict[str, Any]]:
    """What finds a layer in AutoRound's extra_config: by its name, or by an expression that is found in it."""
    exceptions = {name: own for name, own in found.items() if isinstance(own, dict)}
    expressions = []
    for pattern, own in exceptions.items():
        with contextlib.suppress(re.error):  # the name of another layer
            expressions.append((re.compile(pattern), own))

    def find(layer: str) -> dict[str, Any]:
        if layer in exceptions:
            return exceptions[layer]
        return next((own for expression, own in expressions if expression.search(layer)), {})

    return find


# ---- gpt-oss's native format ----


def _of_native(settings: Mapping[str, Any], where: object) -> _Read:
    return lambda layer, fmt: (None, "")  # activations are the engine's to choose


# ---- Model-Optimizer ----


def _of_model_optimizer(settings: Mapping[str, Any], where: object) -> _Read:
    return lambda layer, fmt: _read_model_optimizer(settings, layer, fmt, where)


def _read_model_optimizer(
    settings: Mapping[str, Any], layer: str, fmt: Format, where: object
) -> tuple[str | None, str]:
    algorithm = str(settings.get("quant_algo"))
    if algorithm == _MIXED:
        algorithm = str(_object(_object(settings, "quantized_layers", where), layer, where).get("quant_algo"))
    weights, inputs = _ALGORITHMS.get(algorithm, (None, None))
    if weights != fmt.name:
        raise UserError(
            f"{where}: {layer} is said to be quantized by the quant_algo {algorithm!r}, and its tensors are in "
            f"{fmt.name}; read are {', '.join(_ALGORITHMS)}; {REMEDY}"
        )
    return inputs, ""
