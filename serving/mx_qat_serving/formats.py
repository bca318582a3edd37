"""Which format and rule the inputs of a layer have: what the checkpoint says, and the variable MX_QAT_ACTIVATION_RULE.

vLLM's reader of compressed-tensors does not tell its MXFP4 and MXFP8 kernels whether a checkpoint quantizes inputs, so
the kernels read the layer's entry of `quantization_config` here.
"""

from __future__ import annotations

import os

import torch

from qat.numerics.families import get_format

RULE_VARIABLE = "MX_QAT_ACTIVATION_RULE"
NONE = "none"
# By type, bits, strategy, group size and whether scales are powers of two.
_FORMATS = {
    ("float", 4, "group", 32, True): "mxfp4",
    ("float", 8, "group", 32, True): "mxfp8",
    ("float", 4, "tensor_group", 16, False): "nvfp4",
    ("float", 8, "token", None, False): "fp8_token",
    ("float", 8, "group", 128, False): "fp8_g128",
    ("float", 8, "channel", None, False): "fp8_channel",
    ("int", 4, "group", 32, False): "int4_g32",
    ("int", 4, "group", 128, False): "int4_g128",
}
DEFAULT_RULES = {"mxfp4": "even", "mxfp8": "even", "fp8_token": "absmax", "fp8_g128": "absmax", "nvfp4": "absmax"}


def input_format(layer: torch.nn.Module, default: str) -> str | None:
    """The format in which the checkpoint quantizes the inputs of a layer; None: it does not.

    Args:
        default: what inputs have where the checkpoint is not in compressed-tensors' format: AutoRound's and Quark's
            formats quantize weights and inputs alike.

    Raises:
        ValueError: a format that the library does not have.
    """
    method = getattr(layer, "quant_method", None)
    method = getattr(method, "quant_method", method)  # of a layer whose inputs are transformed, inside of its own
    config = getattr(method, "quantization_config", None)
    if not hasattr(config, "get_scheme_dict"):
        return default
    args = config.get_scheme_dict(layer, layer.prefix)["input_activations"]
    return None if args is None else format_of(args)


def format_of(args) -> str:
    """The format that a `QuantizationArgs` of compressed-tensors describes.

    Raises:
        ValueError: none of the library's.
    """
    fmt = known_format(args)
    if fmt is None:
        raise ValueError(f"the plugin of mx-qat has no kernel for inputs of {args}")
    return fmt


def known_format(args) -> str | None:
    """The format that a `QuantizationArgs` of compressed-tensors describes; None: none of the library's.

    Weights with zero points, and those whose columns were reordered by their activations, have none.
    """
    kind, strategy, order = (
        getattr(value, "value", value) for value in (args.type, args.strategy, getattr(args, "actorder", None))
    )
    if not args.symmetric or order == "group":
        return None
    is_e8m0 = args.scale_dtype == torch.uint8
    return _FORMATS.get((kind, args.num_bits, strategy, args.group_size, is_e8m0))


def chosen_rules() -> list[str]:
    """The rules that the environment names, in order; empty: the defaults.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in os.environ.get(RULE_VARIABLE, "").lower().split(",") if name.strip()]
    known = [NONE, *dict.fromkeys(rule for fmt in DEFAULT_RULES for rule in get_format(fmt).input_rules)]
    for name in names:
        if name not in known:
            raise ValueError(f"{RULE_VARIABLE} names {name!r}; choose among {', '.join(known)}")
    return names


def rule_for(fmt: str) -> str | None:
    """The rule for inputs in a format: the first of the chosen ones that it has; None: inputs are not quantized.

    Raises:
        ValueError: rules were chosen, and the format has none of them.
    """
    names = chosen_rules()
    if NONE in names:
        return None
    rules = get_format(fmt).input_rules
    found = next((name for name in names if name in rules), None if names else DEFAULT_RULES[fmt])
    if found is None:
        raise ValueError(
            f"{RULE_VARIABLE}={','.join(names)} has no rule for activations in {fmt}; add one of {', '.join(rules)}"
        )
    return found
