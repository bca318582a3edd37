"""Schemes by name. Where AutoRound has a preset of the name, ours is the same; a test compares them.

They stand here as data because importing AutoRound takes seconds, in every process of every run.
"""

from __future__ import annotations

from ..errors import UserError
from ..numerics import fp8
from ..numerics.families import get_format
from .spec import Scheme, TensorSpec


def _spec(fmt: str, rule: str | None = None) -> TensorSpec:
    return TensorSpec(get_format(fmt), rule or get_format(fmt).rules[0])


PRESETS = {
    scheme.name: scheme
    for scheme in (
        Scheme("MXFP4", _spec("mxfp4"), _spec("mxfp4")),
        Scheme("MXFP8", _spec("mxfp8"), _spec("mxfp8")),
        Scheme("MXFP4_RCEIL", _spec("mxfp4"), _spec("mxfp4", "rceil")),
        Scheme("MXFP8_RCEIL", _spec("mxfp8"), _spec("mxfp8", "rceil")),
        Scheme("MXFP4A16", _spec("mxfp4")),
        Scheme("MXFP8A16", _spec("mxfp8")),
        Scheme("MXFP4FP8", _spec("mxfp4"), _spec("fp8_token")),
        Scheme("MXFP4FP8_G128", _spec("mxfp4"), _spec("fp8_g128")),
        Scheme("MXFP4MXFP8", _spec("mxfp4"), _spec("mxfp8")),
        Scheme("NVFP4", _spec("nvfp4"), _spec("nvfp4")),
        Scheme("NVFP4A16", _spec("nvfp4")),
        Scheme("INT4_G32", _spec("int4_g32")),
        Scheme("INT4_G128", _spec("int4_g128")),
        Scheme("FP8", _spec("fp8_channel"), _spec("fp8_token")),
    )
}
ALIASES = {"W4A16": "INT4_G128", "W4A16G32": "INT4_G32"}  # AutoRound's names of the same schemes
SCHEMES = tuple(PRESETS)
# Of keys and values in the cache; the first rule is vLLM's.
KV_CACHE_SCHEMES = {"FP8": TensorSpec(fp8.TENSOR, fp8.TENSOR.rules[0])}

INPUT_TRANSFORMS = ("hadamard",)  # see layers/transform.py


def check_transform(name: str, what: str = "input transform") -> None:
    """Raise a UserError for a transform of inputs that does not exist; `what` is what messages call it."""
    if name not in INPUT_TRANSFORMS:
        raise UserError(f"{what} {name!r} is unknown; choose one of {', '.join(INPUT_TRANSFORMS)}")


def get_scheme(name: str, weight_scale_rule: str | None = None, input_scale_rule: str | None = None) -> Scheme:
    """The preset called `name` or that of an alias, in any case; a rule given here replaces the preset's.

    Raises:
        UserError: the name is not one of SCHEMES, or its formats do not have the rule.
    """
    return PRESETS[scheme_name(name)].with_rules(weight_scale_rule, input_scale_rule)


def scheme_name(name: str, what: str = "quantization scheme") -> str:
    """The name of a preset, from it or an alias in any case; `what` is what messages call it.

    Raises:
        UserError: there is no such preset.
    """
    known = ALIASES.get(name.upper(), name.upper()) if isinstance(name, str) else None
    if known not in PRESETS:
        raise UserError(f"{what} {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    return known


def get_kv_cache_scheme(name: str, what: str = "kv_cache_scheme") -> tuple[str, TensorSpec]:
    """Name and spec of the key/value cache's scheme called `name`, in any case; `what` is what messages call it.

    Raises:
        UserError: the name is not one of KV_CACHE_SCHEMES.
    """
    known = name.upper() if isinstance(name, str) else None
    if known not in KV_CACHE_SCHEMES:
        raise UserError(f"{what} {name!r} is unknown; choose one of {', '.join(KV_CACHE_SCHEMES)}")
    return known, KV_CACHE_SCHEMES[known]


def weight_rules() -> tuple[str, ...]:
    """Every scale rule that a weight may have in some scheme."""
    return tuple(dict.fromkeys(rule for scheme in PRESETS.values() for rule in scheme.weight.format.rules))


def input_rules() -> tuple[str, ...]:
    """Every scale rule that inputs may have in some scheme."""
    specs = (scheme.input for scheme in PRESETS.values() if scheme.input is not None)
    return tuple(dict.fromkeys(rule for spec in specs for rule in spec.format.input_rules))
