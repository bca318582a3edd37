"""What a scheme name means for the weight, the input and the output of a linear layer.

The names and their content are AutoRound's presets; this module only translates them into our formats and scale rules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..numerics.formats import BLOCK_SIZE, FORMATS, SCALE_RULES

# Engines quantize activations themselves, and none of them searches.
INPUT_SCALE_RULES = tuple(rule for rule in SCALE_RULES if rule != "search")
SCHEMES = ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL")


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized: AutoRound's `data_type` and `bits`, the block size and whether it is symmetric."""

    data_type: str
    bits: int
    block_size: int = BLOCK_SIZE
    sym: bool = True

    def __post_init__(self) -> None:
        _format_name(self.data_type, self.bits)
        _scale_rule(self.data_type)
        if self.block_size != BLOCK_SIZE:
            raise ValueError(f"block_size={self.block_size} is not an MX block size; the only choice is {BLOCK_SIZE}")
        if not self.sym:
            raise ValueError("sym=False is not possible: MX formats are symmetric and have no zero point; use sym=True")

    @property
    def format_name(self) -> str:
        """Key into `formats.FORMATS`."""
        return _format_name(self.data_type, self.bits)

    @property
    def scale_rule(self) -> str:
        """One of `formats.SCALE_RULES`."""
        return _scale_rule(self.data_type)


@dataclass(frozen=True)
class LayerScheme:
    """A preset by name, translated: specs of the weight and of the input; outputs stay unquantized."""

    name: str
    weight: TensorSpec
    input: TensorSpec


def get_scheme(name: str, weight_scale_rule: str | None = None, input_scale_rule: str | None = None) -> LayerScheme:
    """Look `name` up in AutoRound's presets; a rule given here replaces the preset's.

    Raises:
        ValueError: the name is not one of `SCHEMES`, or a rule not one of `SCALE_RULES`, or inputs shall be searched.
        ImportError: AutoRound is not installed.
    """
    if not isinstance(name, str) or name.upper() not in SCHEMES:
        raise ValueError(f"quantization scheme {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    try:
        from auto_round.schemes import preset_name_to_scheme
    except ImportError as error:
        raise ImportError("quantization schemes come from AutoRound: pip install auto-round") from error
    preset = preset_name_to_scheme(name.upper())
    weight = TensorSpec(preset.data_type, preset.bits, preset.group_size, preset.sym)
    input_ = TensorSpec(preset.act_data_type, preset.act_bits, preset.act_group_size, preset.act_sym)
    return LayerScheme(
        name=name.upper(),
        weight=weight if weight_scale_rule is None else with_scale_rule(weight, weight_scale_rule, SCALE_RULES),
        input=input_ if input_scale_rule is None else with_scale_rule(input_, input_scale_rule, INPUT_SCALE_RULES),
    )


def with_scale_rule(spec: TensorSpec, rule: str, choices: tuple[str, ...] = SCALE_RULES) -> TensorSpec:
    """`spec` under another scale rule, one of `choices`."""
    if rule not in choices:
        raise ValueError(f"scale rule {rule!r} is not possible here; choose one of {', '.join(choices)}")
    base = spec.data_type
    for suffix in SCALE_RULES:
        base = base.removesuffix(f"_{suffix}")
    return replace(spec, data_type=base if rule == "floor" else f"{base}_{rule}")


# AutoRound writes the rule as a suffix of the data type: "mx_fp" and "mx_fp4" round the exponent down, "mx_fp_rceil"
# up. "even" and "search" have no AutoRound name; they follow the same pattern.
def _scale_rule(data_type: str) -> str:
    base, _, suffix = data_type.rpartition("_")
    rule = suffix if base and suffix in SCALE_RULES else "floor"
    return rule


def _format_name(data_type: str, bits: int) -> str:
    base = data_type
    for rule in SCALE_RULES:
        base = base.removesuffix(f"_{rule}")
    name = f"mxfp{bits}"
    if base not in ("mx_fp", f"mx_fp{bits}") or name not in FORMATS:
        choices = ", ".join(f"mx_fp with bits={fmt.bits}" for fmt in FORMATS.values())
        rules = ", ".join(f"_{rule}" for rule in SCALE_RULES if rule != "floor")
        raise ValueError(f"data_type={data_type!r} with bits={bits} is unknown; choose {choices}, suffixes {rules}")
    return name
