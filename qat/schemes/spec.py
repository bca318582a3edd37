"""TensorSpec and Scheme: which format and scale rule a layer's weight and input have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import UserError
from ..numerics.families import formats
from ..numerics.formats import Format

VIEW_DTYPE = torch.bfloat16  # weights are rounded as seen in this dtype: the forward pass under autocast, and export
DEFAULT_BITS = 8
# AutoRound's names of a kind of format with the bits in it, which the reference system takes too.
_ALIASES = {"mx_fp4": ("mx_fp", 4), "mx_fp8": ("mx_fp", 8), "nv_fp4_with_static_gs": ("nv_fp", 4)}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        format: see `numerics.formats.Format`.
        rule: one of `format.rules`.

    Raises:
        UserError: the format has no such rule.
    """

    format: Format
    rule: str

    def __post_init__(self) -> None:
        if self.rule not in self.format.rules:
            raise UserError(
                f"scale rule {self.rule!r} does not exist for {self.format.name}; choose one of "
                f"{', '.join(self.format.rules)}"
            )

    @classmethod
    def of(cls, data_type: str, bits: int | None = None, block_size: int | None = None, sym: bool = True) -> TensorSpec:
        """The spec that AutoRound's names mean.

        Args:
            data_type: "mx_fp", "nv_fp", "int" or "fp" (inputs: "fp_token", "fp_group"), with the scale rule as suffix
                unless it is the default ("mx_fp_rceil"); or "mx_fp4" and "mx_fp8", which name the bits too.
            bits: of a value. Default: what `data_type` names, else 8.
            block_size: values that share a scale; -1 for a whole row. Default: the format's.
            sym: False is refused: these formats have no zero point.

        Raises:
            UserError: no format has these properties.
        """
        base, rule = _split_rule(data_type)
        base, named_bits = _ALIASES.get(base, (base, bits or DEFAULT_BITS))
        found = [f for f in formats().values() if f.data_type == base and f.element.bits == named_bits]
        found = [f for f in found if block_size == (f.block or -1)] or found
        if not found or bits not in (None, named_bits):
            kinds = ", ".join(f"{f.data_type} with bits={f.element.bits}" for f in formats().values())
            raise UserError(f"data_type={data_type!r} with bits={bits} is unknown; choose one of {kinds}")
        fmt = found[0]
        if block_size not in (None, fmt.block or -1):
            choices = " or ".join(str(f.block or -1) for f in found)
            raise UserError(f"block_size={block_size} is not a block size of {base}; the only choice is {choices}")
        if not sym:
            raise UserError(f"sym=False is not possible: {fmt.name} is symmetric and has no zero point; use sym=True")
        return cls(fmt, rule or fmt.rules[0])

    def with_rule(self, rule: str | None) -> TensorSpec:
        """This spec under another scale rule; None keeps its own."""
        return self if rule is None else replace(self, rule=rule)

    @property
    def data_type(self) -> str:
        """AutoRound's name of the kind of format, with the rule as suffix where it is not the default."""
        return self.format.data_type + ("" if self.rule == self.format.rules[0] else f"_{self.rule}")

    @property
    def bits(self) -> int:
        """Of a value."""
        return self.format.element.bits

    @property
    def block_size(self) -> int:
        """Values that share a scale; -1 for a whole row."""
        return self.format.block or -1

    @property
    def sym(self) -> bool:
        """Whether there is no zero point."""
        return True


def _split_rule(data_type: str) -> tuple[str, str | None]:
    """ "mx_fp_rceil" -> ("mx_fp", "rceil"); the longest rule counts."""
    rules = {rule for fmt in formats().values() for rule in fmt.rules}
    for rule in sorted(rules, key=len, reverse=True):
        if data_type.endswith(f"_{rule}"):
            return data_type.removesuffix(f"_{rule}"), rule
    return data_type, None


@dataclass(frozen=True)
class Scheme:
    """What a layer is quantized to.

    Attributes:
        name: of a preset, such as "MXFP4".
        weight: spec of the weight.
        input: spec of the activations that the layer reads; None: they stay as they are (weight-only).
    """

    name: str
    weight: TensorSpec
    input: TensorSpec | None = None

    def with_rules(self, weight: str | None = None, input: str | None = None) -> Scheme:
        """This scheme under other scale rules; None keeps its own.

        Raises:
            UserError: a rule that the format does not have, or that no engine applies to inputs.
        """
        spec = self.input
        if input is not None:
            if spec is None:
                raise UserError(f"{self.name} does not quantize inputs, so it has no scale rule {input!r} for them")
            if input not in spec.format.input_rules:
                raise UserError(
                    f"scale rule {input!r} is not possible for inputs in {spec.format.name}; choose one of "
                    f"{', '.join(spec.format.input_rules)}"
                )
            spec = spec.with_rule(input)
        return replace(self, weight=self.weight.with_rule(weight), input=spec)

    @property
    def has_calibrated_scales(self) -> bool:
        """Whether inputs are quantized under a scale that does not follow from them: that of a whole tensor."""
        return self.input is not None and self.input.format.tensor_scale is not None

    @property
    def rules(self) -> dict[str, str | None]:
        """{"weight": RULE, "input": RULE or None}, as `QATConfig.scale_rules` keeps them."""
        return {"weight": self.weight.rule, "input": None if self.input is None else self.input.rule}
