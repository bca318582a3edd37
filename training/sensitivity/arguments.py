"""Arguments of training.sensitivity: what is measured, and the bits budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat import SCHEMES, get_scheme
from qat.errors import UserError
from qat.schemes.mapping_file import DEFAULT_IGNORE, with_patterns
from qat.schemes.patterns import HELP as PATTERNS
from qat.schemes.presets import INPUT_TRANSFORMS, input_rules, weight_rules
from qat.schemes.spec import Scheme

from ..arguments.quantization import Strength, check_smooth_alpha
from .bits_budget import nominal_bits

UNITS = ("projection", "block")


@dataclass
class SensitivityArguments:
    """What is measured, and the bits budget."""

    output_dir: str = field(default="sensitivity", metadata={"help": "Folder for mapping.json and sensitivity.png."})
    bits_budget: float = field(default=5.0, metadata={"help": "Bits per quantized weight on average, scales included."})
    narrow_scheme: str = field(default="MXFP4", metadata={"help": f"For most layers: one of {', '.join(SCHEMES)}."})
    wide_scheme: str = field(default="MXFP8", metadata={"help": "For the layers that gain most by it."})
    weight_scale_rule: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(weight_rules())}; default: the schemes' own."}
    )
    input_scale_rule: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(input_rules())}; default: the schemes' own."}
    )
    smooth_alpha: Strength = field(
        default=0.0, metadata={"help": "Smooth the model first, as main.py does with the same value. 0: off."}
    )
    input_transform: str = field(
        default="none",
        metadata={
            "help": "Transform the inputs of all layers that can be, as main.py does with the same value.",
            "choices": ["none", *INPUT_TRANSFORMS],
        },
    )
    units: str = field(
        default="projection",
        metadata={
            "help": "What gets one scheme: projection (layers, those that engines fuse together), or block (all layers "
            "of a numbered block; fewer measurements).",
            "choices": list(UNITS),
        },
    )
    ignore: list[str] = field(
        default_factory=lambda: list(DEFAULT_IGNORE),
        metadata={"help": f"Layers to leave unquantized, beside {', '.join(DEFAULT_IGNORE)}: {PATTERNS}."},
    )
    samples: int = field(
        default=64,
        metadata={
            "help": "Training samples to measure on, evenly spread (rows with --packing); all if there are fewer."
        },
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Samples computed at once."})
    model_max_length: int = field(default=512, metadata={"help": "Samples are cut at this many tokens."})

    def __post_init__(self) -> None:
        check_smooth_alpha(self.smooth_alpha)
        self.ignore = list(with_patterns(DEFAULT_IGNORE, self.ignore))
        if self.samples < 1:
            raise UserError(f"--samples {self.samples}: at least 1 training sample is needed to measure on")
        if self.per_device_eval_batch_size < 1:
            raise UserError(
                f"--per_device_eval_batch_size {self.per_device_eval_batch_size}: nothing would be measured; give a "
                "positive number"
            )
        if self.model_max_length < 2:
            raise UserError(f"--model_max_length {self.model_max_length} is too short; samples need at least 2 tokens")
        for name, choices in (("weight_scale_rule", weight_rules()), ("input_scale_rule", input_rules())):
            if (rule := getattr(self, name)) is not None and rule not in choices:
                raise UserError(f"--{name} {rule!r} is unknown; choose one of {', '.join(choices)}")
        narrow, wide = self._scheme("narrow_scheme"), self._scheme("wide_scheme")
        self.narrow_scheme, self.wide_scheme = narrow.name, wide.name
        low, high = nominal_bits(narrow), nominal_bits(wide)
        if not low < high:
            raise UserError(f"--wide_scheme {self.wide_scheme} is not wider than --narrow_scheme {self.narrow_scheme}")
        if not low <= self.bits_budget <= high:
            raise UserError(
                f"--bits_budget {self.bits_budget} must lie between the {low} bits a weight of {narrow.name} and "
                f"the {high} of {wide.name}"
            )

    def _scheme(self, name: str) -> Scheme:
        try:
            return get_scheme(getattr(self, name), self.weight_scale_rule, self.input_scale_rule)
        except ValueError as error:
            raise UserError(f"--{name} {getattr(self, name)}: {error}") from error

    @property
    def schemes(self) -> tuple[str, str]:
        """The narrow one and the wide one."""
        return self.narrow_scheme, self.wide_scheme
