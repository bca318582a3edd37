"""Arguments of main.py: low-rank adapters, in place of training all weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qat.errors import UserError

from .distillation import DistillationArguments
from .memory import fsdp_version
from .quantization import QuantizationArguments
from .training import TrainingArguments

ALL_LINEAR = "all-linear"
BASE_UNDER_FSDP = (
    "--base_in_scheme True: FSDP does not shard packed weights; train on one GPU or on several with a copy each "
    "(accelerate_config/ddp.yaml), or give --base_in_scheme False"
)
INITS = ("default", "pissa", "olora")


@dataclass
class LoraArguments:
    """Whether to train low-rank adapters of a frozen model, and which."""

    lora_r: int = field(
        default=0,
        metadata={
            "help": "Train low-rank adapters of this rank (LoRA) in place of the weights, which stay frozen; 0: all "
            "weights. The merged weight is what is quantized, saved and packed. See docs/adapters.md."
        },
    )
    lora_alpha: int = field(
        default=32, metadata={"help": "Numerator of the adapters' scaling, lora_alpha / lora_r, as in PEFT."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "0: an adapter that is merged into a rounded weight has no dropout of its own."}
    )
    lora_target: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Layers that get adapters: {ALL_LINEAR} (the default: every linear layer but the head), or names "
            "or one regular expression as PEFT's target_modules."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Fused parameters of experts that get adapters, an A and a B for each expert, as PEFT's "
            "target_parameters: mlp.experts.gate_up_proj mlp.experts.down_proj."
        },
    )
    lora_init: str = field(
        default="default",
        metadata={
            "help": "How adapters begin: default (A random, B zero), pissa (principal singular vectors, which the "
            "frozen weight then lacks) or olora (QR decomposition, likewise)."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA), as in PEFT."}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Start from this LoRA adapter on --model_name_or_path: folder or hub id, PEFT's format."},
    )
    base_in_scheme: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen weights of quantized layers as packed codes of their scheme (QLoRA): 4.25 bits a "
            "value in MXFP4 in place of 16, at some cost in accuracy. See docs/qlora.md."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "Not supported: see docs/adapters.md."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Not supported: see docs/adapters.md."})

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise UserError(f"--lora_r {self.lora_r} is negative; give a rank such as 16, or 0 to train all weights")
        self._check_refused()
        if self.lora_init not in INITS:
            raise UserError(f"--lora_init {self.lora_init!r} is unknown; choose one of {', '.join(INITS)}")
        if self.lora_alpha <= 0:
            raise UserError(f"--lora_alpha {self.lora_alpha} must be greater than 0, such as 32")
        if self.adapter_name_or_path is not None:
            self._check_unused(
                ("lora_r", "lora_alpha", "lora_target", "lora_target_parameters", "lora_init", "use_rslora"),
                f"beside --adapter_name_or_path {self.adapter_name_or_path!r}, which has its own",
                "leave it out",
            )
        elif not self.is_on:
            names = ("lora_alpha", "lora_target", "lora_target_parameters", "lora_init", "use_rslora", "base_in_scheme")
            self._check_unused(names, "without adapters", "give --lora_r, such as 16, too, or leave it out")

    def _check_refused(self) -> None:
        """Raises UserError for what PEFT has and merged quantization cannot do."""
        if self.lora_dropout != 0:
            raise UserError(
                f"--lora_dropout {self.lora_dropout}: dropout acts on an adapter's input, and a merged weight has no "
                "such input: the rounded weight would not be the one that is served. Give --lora_dropout 0"
            )
        if self.use_dora:
            raise UserError(
                "--use_dora True: DoRA divides by the norm of the merged weight and is not supported; give --use_dora "
                "False"
            )
        if self.modules_to_save:
            raise UserError(
                f"--modules_to_save {' '.join(self.modules_to_save)}: only adapters are trained beside frozen weights; "
                "leave it out, give such linear layers an adapter by --lora_target, or train all weights (--lora_r 0)"
            )

    def _check_unused(self, names: tuple[str, ...], why: str, remedy: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                shown = " ".join(value) if isinstance(value, list) else value
                raise UserError(f"--{name} {shown} has no effect {why}; {remedy}")

    def check_trains(self, do_train: bool) -> None:
        """Raise a UserError for new adapters that nothing trains."""
        if self.lora_r and not do_train:
            raise UserError(
                f"--lora_r {self.lora_r} has no effect without --do_train True: new adapters add nothing; leave it "
                "out, or name an adapter to evaluate with --adapter_name_or_path"
            )

    @property
    def changes_base(self) -> bool:
        """Whether adapters begin as a part of the frozen weights, which these then lack."""
        return self.lora_init != "default"

    def check_with(self, quantization: QuantizationArguments) -> None:
        """Raise a UserError for settings of quantization that do not go with adapters."""
        if quantization.learns:
            name = next(name for name, on in quantization.learned.items() if on)
            raise UserError(
                f"--{name} True: it trains scales beside weights that are trained themselves, and with adapters these "
                f"are frozen; leave --{name} out, or --lora_r"
            )
        for name, off in (("smooth_alpha", 0), ("weight_init", "none")):
            if self.adapter_name_or_path is not None and (value := getattr(quantization, name)) != off:
                raise UserError(
                    f"--{name} {value} changes the weights that --adapter_name_or_path {self.adapter_name_or_path!r} "
                    f"was trained for; give --{name} {off}, or give the model that peft merged (merge_and_unload) as "
                    "--model_name_or_path"
                )

    def check_base(self, distillation: DistillationArguments) -> None:
        """Raise a UserError for settings that do not go with a packed base, if one is asked for."""
        if not self.base_in_scheme:
            return
        if fsdp_version():
            raise UserError(BASE_UNDER_FSDP)
        if self.lora_init != "default":
            raise UserError(
                f"--lora_init {self.lora_init} takes a part of the weights out of the frozen base, which "
                "--base_in_scheme True has rounded: what is left would be rounded again, and the model not begin as it "
                "was. Give --lora_init default"
            )
        named = distillation.teacher_model_name_or_path is not None
        if distillation.distill and not named and distillation.distill_teacher in (None, "self"):
            given = "--distill_teacher self" if distillation.distill_teacher else "--distill True"
            raise UserError(
                f"{given} with --base_in_scheme True: without quantizers and adapters the student is its rounded base, "
                "not the model that it came from. Give --distill_teacher cache, which computes that model's "
                "distributions before it is packed and takes no memory afterwards, or --distill_teacher copy"
            )

    def check_masters(self, training: TrainingArguments) -> None:
        """Raise a UserError for settings of training that save memory where all weights are trained."""
        for name, value in (("master_dtype", "bfloat16"), ("optimizer_in_backward", True)):
            if getattr(training, name) == value:
                raise UserError(
                    f"--{name} {value} saves memory of weights that are trained, and with adapters these are frozen; "
                    "adapters are a hundredth of them, and FP32: leave it out, or --lora_r"
                )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained or evaluated."""
        return self.lora_r > 0 or self.adapter_name_or_path is not None

    @property
    def target_modules(self) -> str | list[str]:
        """As PEFT's LoraConfig takes it: names, or one regular expression, which has more than letters and dots."""
        targets = self.lora_target or [ALL_LINEAR]
        return targets[0] if targets == [ALL_LINEAR] or _is_expression(targets) else targets


def _is_expression(targets: list[str]) -> bool:
    return len(targets) == 1 and not re.fullmatch(r"[\w.\-]+", targets[0])


def check_with_adapters(gather_dtype: str = "float32", version: int | None = None) -> None:
    """Refuse what keeps frozen weights and their adapters from being sharded together.

    Args:
        version: of FSDP; default: the one that `accelerate launch` asks for, if any.

    Raises:
        UserError: FSDP1, or a `gather_dtype` that would round A and B.
    """
    if (fsdp_version() if version is None else version) == 1:
        raise UserError(
            "--lora_r: FSDP1 (fsdp_version: 1) flattens frozen BF16 weights and FP32 adapters into one parameter of "
            "one dtype; start with accelerate launch --config_file accelerate_config/fsdp2.yaml"
        )
    if gather_dtype != "float32":
        raise UserError(
            f"--fsdp_gather_dtype {gather_dtype} would round adapters whenever they are gathered, and other weights "
            "would be trained than are saved; leave it out: frozen weights are gathered in their own dtype"
        )
