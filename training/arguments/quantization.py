"""Arguments of main.py: how to quantize, and how to train what is quantized."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from qat import SCHEMES, get_scheme
from qat.checkpoints.dialects import AUTO, EXPORT_FORMATS, get_dialect, resolved_format
from qat.checkpoints.dialects.mxfp4 import experts_only
from qat.errors import UserError
from qat.layers.fp8_matmul import MODES
from qat.layers.learned import SETTINGS, check_learnable, optimizer_settings
from qat.layers.sites import LINEAR
from qat.layers.transformed import AUTO as LAYERS_AUTO
from qat.schemes.mapping_file import DEFAULT_IGNORE, load_mapping, load_measurement, with_patterns
from qat.schemes.patterns import HELP as PATTERNS
from qat.schemes.patterns import check_patterns
from qat.schemes.presets import (
    INPUT_TRANSFORMS,
    KV_CACHE_SCHEMES,
    get_kv_cache_scheme,
    input_rules,
    scheme_name,
    weight_rules,
)
from qat.transforms.strength import AUTO as STRENGTH_AUTO

logger = logging.getLogger(__name__)


_RATES = ("exponent_learning_rate", "scale_learning_rate")  # of what SETTINGS let layers learn


WEIGHT_INITS = ("none", "gptq")

_YAML_WORDS = {"True": "on", "False": "off"}  # what YAML makes of on and off


def strength(text: str) -> float | str:
    """A strength of smoothing from a command line: a number, or the word auto; ValueError for another text."""
    return text if text == STRENGTH_AUTO else float(text)


if TYPE_CHECKING:
    Strength: TypeAlias = float | str
else:
    Strength = strength  # HfArgumentParser calls the type of a field with the text; `float | str` is float to it


def check_smooth_alpha(alpha: float | str) -> None:
    """Raises UserError unless `alpha` is 0, for no smoothing, or at most 1, or the word auto."""
    if alpha != STRENGTH_AUTO and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise UserError(f"--smooth_alpha {alpha} is out of range; choose 0 (off) to 1, such as 0.7, or {STRENGTH_AUTO}")


@dataclass
class QuantizationArguments:
    """How to quantize."""

    quant_scheme: str | None = field(
        default=None,
        metadata={
            "help": f"Quantization scheme, one of {', '.join(SCHEMES)}. With --do_train: quantization-aware training; "
            "without: evaluation after plain rounding (PTQ). Default: none, or the scheme of a QAT folder."
        },
    )
    kv_cache_scheme: str | None = field(
        default=None,
        metadata={
            "help": f"Quantize keys and values in the cache, too: {', '.join(KV_CACHE_SCHEMES)}. Their scales are "
            "calibrated on training samples. Needs --quant_scheme or --quant_mapping; a QAT folder keeps its own."
        },
    )

    weight_scale_rule: str | None = field(
        default=None,
        metadata={
            "help": f"Scale rule of weights, one of {', '.join(weight_rules())}; default: the scheme's own. "
            "search picks the better of two exponents for each block."
        },
    )
    input_scale_rule: str | None = field(
        default=None,
        metadata={
            "help": f"Scale rule of activations, one of {', '.join(input_rules())}; default: the scheme's own. "
            "Choose the rule of the engine that will serve the model."
        },
    )
    smooth_alpha: Strength = field(
        default=0.0,
        metadata={
            "help": "Smooth activations before training: migration strength of SmoothQuant, which moves outliers into "
            "the weights exactly, at no cost in serving. 0: off; 0.7 is a good start for MXFP4; auto: for each "
            "activation the strength with the least error in the outputs of the layers that read it."
        },
    )
    weight_init: str = field(
        default="none",
        metadata={
            "help": f"Change weights before training: {', '.join(WEIGHT_INITS)}. gptq lets those of linear layers make "
            "up for their own rounding in the outputs on --weight_init_samples; training starts nearer to the "
            "unquantized model, most where it is short or its learning rate low."
        },
    )
    weight_init_samples: int = field(
        default=128,
        metadata={"help": "Training samples that --weight_init reads. At most 512 tokens of each are read."},
    )
    quant_mapping: str | None = field(
        default=None,
        metadata={
            "help": "Mixed precision: a JSON file of schemes by layer name or glob, in place of --quant_scheme; "
            "python -m training.sensitivity proposes one."
        },
    )
    ignore: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Layers to leave unquantized, beside those of --quant_mapping and {', '.join(DEFAULT_IGNORE)}: "
            f"{PATTERNS}. One that matches nothing is an error."
        },
    )
    input_transform: str = field(
        default="none",
        metadata={
            "help": f"Transform of the inputs of --input_transform_layers before they are rounded: none, "
            f"{', '.join(INPUT_TRANSFORMS)}. hadamard spreads outliers over blocks of 32 values; engines must apply it "
            "when they serve the model, as vLLM does. Weights in MX formats only."
        },
    )
    input_transform_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Layers whose inputs are transformed: {PATTERNS}; default: {LAYERS_AUTO}, all quantized layers "
            "that vLLM serves so: linear ones without a bias, not experts."
        },
    )
    learn_exponent: bool = field(
        default=False,
        metadata={
            "help": "Train the block exponents of weights in MXFP4 and MXFP8 too; what is saved is a plain checkpoint "
            "all the same."
        },
    )
    exponent_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the exponents, which move in whole steps; no weight decay."}
    )
    learn_scale: bool = field(
        default=False,
        metadata={
            "help": "Train the block scales of weights in NVFP4 and INT4 too (LSQ); what is saved is a plain "
            "checkpoint all the same."
        },
    )
    scale_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the scales, relative to their size; no weight decay."}
    )
    calibration_samples: int = field(
        default=32,
        metadata={
            "help": "Training samples from which the scales are calibrated that do not follow from weights: those of "
            "NVFP4's inputs and of the key/value cache. At most 512 tokens of each are read."
        },
    )
    input_scale_refresh: int = field(
        default=0,
        metadata={"help": "Calibrate again every so many training steps, on the same samples; 0: never."},
    )
    log_quantization: bool = field(
        default=True,
        metadata={"help": "Log how many codes flip and oscillate and how many values saturate, by group of layers."},
    )
    fp8_matmul: str = field(
        default="auto",
        metadata={
            "help": "Compute forward products in FP8, from the same quantized values: auto, where the GPU can and the "
            "values of the scheme fit (MXFP4, FP8, MXFP4FP8); on, or an error; off."
        },
    )
    export_format: str = field(
        default=AUTO,
        metadata={
            "help": "After quantization-aware training, pack the model into output_dir/SCHEME: "
            f"{', '.join(EXPORT_FORMATS)}, or none. auto is mxfp4, its native format, for gpt-oss, and "
            "compressed-tensors for all other models; mxfp4 holds quantized experts only."
        },
    )

    def __post_init__(self) -> None:
        if self.export_format not in (*EXPORT_FORMATS, "none"):
            raise UserError(
                f"--export_format {self.export_format!r} is unknown; choose one of {', '.join(EXPORT_FORMATS)}, none"
            )
        self.fp8_matmul = _YAML_WORDS.get(self.fp8_matmul, self.fp8_matmul)
        if self.fp8_matmul not in MODES:
            raise UserError(f"--fp8_matmul {self.fp8_matmul!r} is unknown; choose one of {', '.join(MODES)}")
        check_smooth_alpha(self.smooth_alpha)
        self._check_weight_init()
        self._check_cache()
        self._check_ignore()
        self._check_transform()
        for name, choices in (("weight_scale_rule", weight_rules()), ("input_scale_rule", input_rules())):
            rule = getattr(self, name)
            if rule is not None and rule not in choices:
                raise UserError(f"--{name} {rule!r} is unknown; choose one of {', '.join(choices)}")
        if self.calibration_samples < 1:
            raise UserError(f"--calibration_samples {self.calibration_samples} must be at least 1, such as 32")
        if self.input_scale_refresh < 0:
            raise UserError(f"--input_scale_refresh {self.input_scale_refresh} must be 0 (never) or a number of steps")
        self._check_rates()
        if self.quant_mapping is not None:
            if self.quant_scheme is not None:
                raise UserError("--quant_mapping names the schemes itself; give either it or --quant_scheme")
            try:
                mapping, _ = load_mapping(self.quant_mapping)
                load_measurement(self.quant_mapping)
            except UserError as error:
                raise UserError(f"--quant_mapping: {error}") from error
            self._check_rules(*mapping.values())
            return
        if self.quant_scheme is None:
            for name in ("weight_scale_rule", "input_scale_rule"):
                if (value := getattr(self, name)) is not None:
                    raise UserError(
                        f"--{name} {value} has no effect without --quant_scheme or --quant_mapping; a model that was "
                        f"saved for a scheme keeps its rules: give its scheme, too, or leave out --{name}"
                    )
            return
        self.quant_scheme = scheme_name(self.quant_scheme, "--quant_scheme")
        self._check_rules(self.quant_scheme)

    def _check_rates(self) -> None:
        """Raises UserError for a learning rate that cannot be one, or of something that is not learned."""
        for name, setting in zip(_RATES, SETTINGS, strict=True):
            rate = getattr(self, name)
            if not 0 < rate < math.inf:
                raise UserError(f"--{name} {rate} must be greater than 0, and finite")
            if rate != getattr(type(self), name) and not getattr(self, setting):
                raise UserError(f"--{name} {rate} has no effect without --{setting} True; give that too, or omit it")

    def _check_weight_init(self) -> None:
        """Raises UserError for a change of weights that does not exist, and for samples that nothing reads."""
        name, samples, default = self.weight_init, self.weight_init_samples, type(self).weight_init_samples
        if name not in WEIGHT_INITS:
            raise UserError(f"--weight_init {name!r} is unknown; choose one of {', '.join(WEIGHT_INITS)}")
        if samples < 1:
            raise UserError(f"--weight_init_samples {samples} must be at least 1, such as {default}")
        if name == "none" and samples != default:
            raise UserError(
                f"--weight_init_samples {samples} has no effect without --weight_init gptq; give that too, or omit it"
            )

    def _check_cache(self) -> None:
        """Raises UserError for a scheme of the cache that does not exist, or has no scheme of weights beside it."""
        if self.kv_cache_scheme is not None:
            self.kv_cache_scheme, _ = get_kv_cache_scheme(self.kv_cache_scheme, "--kv_cache_scheme")
            if self.quant_scheme is None and self.quant_mapping is None:
                raise UserError(
                    f"--kv_cache_scheme {self.kv_cache_scheme} needs --quant_scheme or --quant_mapping beside it; give "
                    "one of them, or omit it (a model that was trained with it keeps it)"
                )

    def _check_ignore(self) -> None:
        """Raises UserError for patterns without effect: nothing is quantized, or a model keeps its own."""
        if self.ignore and not self.names_schemes:
            raise UserError(
                f"--ignore {' '.join(self.ignore)} has no effect without --quant_scheme or --quant_mapping; give one "
                "of them, or omit it (a model that was trained with it keeps it)"
            )
        check_patterns(self.ignore or ())

    def _check_transform(self) -> None:
        """Raises UserError for a transform of inputs that does not exist, or has no effect."""
        if self.input_transform not in (choices := ("none", *INPUT_TRANSFORMS)):
            raise UserError(
                f"--input_transform {self.input_transform!r} is unknown; choose one of {', '.join(choices)}"
            )
        layers = self.input_transform_layers or [LAYERS_AUTO]
        if self.input_transform == "none":
            if layers != [LAYERS_AUTO]:
                raise UserError(
                    f"--input_transform_layers {' '.join(layers)} has no effect without "
                    f"--input_transform; give that too ({', '.join(INPUT_TRANSFORMS)}), or omit it"
                )
            return
        if not self.names_schemes:
            raise UserError(
                f"--input_transform {self.input_transform} needs --quant_scheme or --quant_mapping beside it; give one "
                "of them, or omit it (a model that was trained with it keeps it)"
            )
        if LAYERS_AUTO in layers and len(layers) > 1:
            raise UserError(
                f"--input_transform_layers {' '.join(layers)}: {LAYERS_AUTO} chooses the layers itself; give it alone, "
                "or patterns"
            )
        check_patterns(layers)

    @property
    def input_transforms(self) -> dict[str, str] | str:
        """The transforms of inputs as `prepare_qat` takes them: by pattern, or one for all layers that can have it."""
        if self.input_transform == "none":
            return {}
        layers = self.input_transform_layers or [LAYERS_AUTO]
        return self.input_transform if layers == [LAYERS_AUTO] else dict.fromkeys(layers, self.input_transform)

    def _check_rules(self, *schemes: str) -> None:
        """Raises UserError for a scale rule that the formats of a scheme do not have."""
        given = {"weight_scale_rule": (self.weight_scale_rule, None), "input_scale_rule": (None, self.input_scale_rule)}
        for scheme in schemes:
            for name, rules in given.items():
                try:
                    get_scheme(scheme, *rules)
                except ValueError as error:
                    raise UserError(f"--{name} does not go with the scheme {scheme}: {error}") from error
            try:
                check_learnable(
                    get_scheme(scheme, self.weight_scale_rule).weight, (name for name, on in self.learned.items() if on)
                )
            except UserError as error:
                message = re.sub(r"(learn_\w+)=(\w+)", r"--\1 \2", str(error))
                raise UserError(f"the scheme {scheme}: {message}") from error

    def layers_of(self, model_type: str) -> tuple[dict[str, str], tuple[str, ...]] | None:
        """`layers` for a kind of model: in an export format that holds experts only, what is meant for all layers is
        for experts, which is logged."""
        if (layers := self.layers()) is None or self.export_format == "none":
            return layers
        try:
            dialect = get_dialect(resolved_format(self.export_format, model_type))
        except UserError as error:
            raise UserError(f"--export_format {self.export_format}: {error}") from error
        if not dialect.packs_fused or (mapping := experts_only(layers[0])) == layers[0]:
            return layers
        logger.info(
            "--export_format %s: gpt-oss's native format holds experts only, so its attention stays in BF16; "
            "--export_format compressed-tensors quantizes both", self.export_format,
        )  # fmt: skip
        return mapping, layers[1]

    def layers(self) -> tuple[dict[str, str], tuple[str, ...]] | None:
        """Mapping and ignored layers as `prepare_qat` takes them; None where neither scheme nor mapping is given."""
        if self.quant_mapping is not None:
            self._warn_if_measured_otherwise()
            mapping, ignore = load_mapping(self.quant_mapping)
        elif self.quant_scheme is not None:
            mapping, ignore = {LINEAR.key: self.quant_scheme}, DEFAULT_IGNORE
        else:
            return None
        return mapping, with_patterns(ignore, self.ignore)

    def _warn_if_measured_otherwise(self) -> None:
        """Warn if the mapping was measured under other settings than this run's: they may rank layers differently."""
        measured = load_measurement(self.quant_mapping)
        alpha = measured.get("smooth_alpha", self.smooth_alpha)
        if alpha != self.smooth_alpha:
            logger.warning(
                "--quant_mapping %s was measured with --smooth_alpha %s, and this run has --smooth_alpha %s, so "
                "the ranking of layers may differ; give both the same", self.quant_mapping, alpha, self.smooth_alpha,
            )  # fmt: skip
        transform = measured.get("input_transform", "none" if measured else self.input_transform)
        if transform != self.input_transform:
            logger.warning(
                "--quant_mapping %s was measured with --input_transform %s, and this run has --input_transform %s, so "
                "the ranking of layers may differ; give both the same", self.quant_mapping, transform,
                self.input_transform,
            )  # fmt: skip
        rules = measured.get("scale_rules", {})
        for name in sorted(set(load_mapping(self.quant_mapping)[0].values()) & set(rules)):
            own = get_scheme(name, self.weight_scale_rule, self.input_scale_rule).rules
            if rules[name] != own:
                logger.warning(
                    "--quant_mapping %s was measured with the scale rules %s of %s, and this run has %s, so the "
                    "ranking of layers may differ; give both the same --weight_scale_rule and --input_scale_rule",
                    self.quant_mapping, rules[name], name, own,
                )  # fmt: skip

    @property
    def names_schemes(self) -> bool:
        """Whether --quant_scheme or --quant_mapping says what to quantize in."""
        return self.quant_scheme is not None or self.quant_mapping is not None

    def check_unused(self) -> None:
        """Raise a UserError for a setting that has no effect where nothing is quantized."""
        names = ("smooth_alpha", "weight_init", "calibration_samples", "input_scale_refresh", "fp8_matmul")
        for name in (*SETTINGS, *names):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise UserError(
                    f"--{name} {value} needs a model to quantize: give --quant_scheme (one of {', '.join(SCHEMES)}) or "
                    "--quant_mapping, or omit it"
                )
        if self.export_format not in (type(self).export_format, "none"):
            raise UserError(
                f"--export_format {self.export_format} has no effect: nothing is quantized, so nothing is packed; give "
                f"--quant_scheme (one of {', '.join(SCHEMES)}) or --quant_mapping, or omit it"
            )

    @property
    def learned(self) -> dict[str, bool]:
        """What layers train beside their weights, as `prepare_qat` takes it."""
        return {setting: getattr(self, setting) for setting in SETTINGS}

    @property
    def learns(self) -> bool:
        """Whether layers train something beside their weights."""
        return any(self.learned.values())

    @property
    def parameter_groups(self) -> dict[str, dict]:
        """Optimizer settings for what layers train beside their weights, by the ends of names."""
        return optimizer_settings(
            self.exponent_learning_rate if self.learn_exponent else None,
            self.scale_learning_rate if self.learn_scale else None,
        )
