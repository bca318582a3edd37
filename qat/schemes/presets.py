"""Schemes by name. Where AutoRound has a preset of the name, ours is the same; a test compares them.

They stand here as data because importing AutoRound takes seconds, in every process of every run.
"""

from __future__ import annotations

from ..errors import UserError
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
        Scheme("FP8", _spec("fp8_channel"), _spec("fp8_token")),
    )
}
SCHEMES = tuple(PRESETS)


def get_scheme(name: str, weight_scale_rule: str | None = None, input_scale_rule: str | None = None) -> Scheme:
    """The preset called `name`, in any case; a rule given here replaces the preset's.

    Raises:
        UserError: the name is not one of SCHEMES, or its formats do not have the rule.
    """
    if not isinstance(name, str) or name.upper() not in PRESETS:
        raise UserError(f"quantization scheme {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    return PRESETS[name.upper()].with_rules(weight_scale_rule, input_scale_rule)


def weight_rules() -> tuple[str, ...]:
    """Every scale rule that a weight may have in some scheme."""
    return tuple(dict.fromkeys(rule for scheme in PRESETS.values() for rule in scheme.weight.format.rules))


def input_rules() -> tuple[str, ...]:
    """Every scale rule that inputs may have in some scheme."""
    specs = (scheme.input for scheme in PRESETS.values() if scheme.input is not None)
    return tuple(dict.fromkeys(rule for spec in specs for rule in spec.format.input_rules))
