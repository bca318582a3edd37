"""Arguments of main.py: whether to learn from an unquantized teacher, and from which."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from qat.errors import UserError

TEACHERS = ("copy", "cache", "self")
SAMPLES = ("teacher", CHAT := "chat")  # of the teacher: texts, and conversations
SELF_IN_TRAINING = (
    "--distill_teacher self is for evaluation (--do_eval without --do_train) and for adapters (--lora_r): while all "
    "weights train, the teacher changes with the student, and nothing holds both to the model that the stage starts "
    "from. Choose --distill_teacher copy or cache"
)
NO_GENERIC = "--distill_generic none"  # which a recipe may set, so that each refusal names what switches it off
# What leaves a setting out that a recipe sets.
_LEFT_OUT = {
    "distill_temperature": "--distill_temperature 1", "distill_ce_weight": "--distill_ce_weight 0",
    "distill_generic": NO_GENERIC, "distill_generic_share": NO_GENERIC,
    "distill_generic_length": "--distill_generic_length 0", "distill_top_k": "--distill_top_k 16",
    "distill_samples": "--distill_samples 16",
}  # fmt: skip


def is_sampled(name: str) -> bool:
    """Whether generic text of this name is sampled from a teacher, in place of a FILE."""
    return name.partition(":")[0] in SAMPLES and ":" in name


@dataclass(frozen=True)
class CacheSettings:
    """What is kept of a distribution.

    Args:
        top_k: tokens kept with their probability.
        samples: tokens drawn from the rest.
        temperature: of the distribution.
        seed: of the draws.
    """

    top_k: int = 16
    samples: int = 16
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UserError(f"--distill_top_k {self.top_k} is negative; 0 keeps sampled tokens only")
        if self.samples < 1:
            raise UserError(
                f"--distill_samples {self.samples}: at least 1 token must stand for the rest of the distribution"
            )


@dataclass
class DistillationArguments:
    """Whether to learn from an unquantized teacher instead of from the data's own tokens."""

    unread_generic = None  # what --distill_generic named in an evaluation alone, which leaves it out; no argument

    distill: bool = field(
        default=False,
        metadata={"help": "Learn the token distributions of the model that this stage starts from, unquantized."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another teacher: hub id or local folder; implies --distill True."}
    )
    distill_teacher: str | None = field(
        default=None,
        metadata={
            "help": "How the teacher is there: copy keeps a frozen model in memory; cache computes its distributions "
            "once and keeps a sample of each on disk; self is the student with its quantizers and adapters off. "
            "Default: self where adapters are trained, else copy. See docs/distillation.md.",
            "choices": list(TEACHERS),
        },
    )
    distill_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where --distill_teacher cache keeps distributions, and --distill_generic teacher:N or chat:N its "
            "samples. Default: beside the data's."
        },
    )
    distill_top_k: int = field(
        default=16, metadata={"help": "Most likely tokens of each distribution that are cached with their probability."}
    )
    distill_samples: int = field(
        default=16, metadata={"help": "Tokens drawn from the rest of each distribution for the cache, at least 1."}
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions; above 1 flattens them."}
    )
    distill_ce_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of cross-entropy with the data's tokens in the loss, from 0 to 1; the rest is KL."},
    )
    distill_generic: str | None = field(
        default=None,
        metadata={
            "help": "Text from elsewhere for the divergence alone: a FILE (.txt, or written like --dataset), or N "
            "samples of the teacher: teacher:N are texts, chat:N conversations in its chat template; none switches off "
            "what a recipe sets. See docs/distillation.md."
        },
    )
    distill_generic_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of each sample of --distill_generic teacher:N, chat:N. Default, and 0: --model_max_length."
        },
    )
    distill_generic_share: float = field(
        default=0.25, metadata={"help": "Fraction of the rows of each step that are of --distill_generic."}
    )
    eval_generic: str | None = field(
        default=None,
        metadata={
            "help": "A FILE, written like that of --distill_generic, that is evaluated beside the evaluation set: "
            "eval_generic_kl and others."
        },
    )

    def __post_init__(self) -> None:
        given = self.distill_teacher not in (None, "copy")
        self.distill = self.distill or self.teacher_model_name_or_path is not None or given
        if self.distill_teacher not in (None, *TEACHERS):
            raise UserError(
                f"--distill_teacher {self.distill_teacher!r} is unknown; choose one of {', '.join(TEACHERS)}"
            )
        if self.distill_teacher == "self" and self.teacher_model_name_or_path is not None:
            raise UserError(
                f"--distill_teacher self and --teacher_model_name_or_path {self.teacher_model_name_or_path!r} name two "
                "teachers; give one of them"
            )
        if not 0 < self.distill_temperature < math.inf:
            raise UserError(f"--distill_temperature {self.distill_temperature} must be greater than 0, and finite")
        if not 0 <= self.distill_ce_weight < 1:
            raise UserError(
                f"--distill_ce_weight {self.distill_ce_weight} must lie between 0 (KL only) and 1, at which nothing is "
                "learned from a teacher: leave --distill out then"
            )
        self._check_generic()
        self.cache_settings = CacheSettings(self.distill_top_k, self.distill_samples, self.distill_temperature)
        self._check_unused()

    @property
    def generic_continuations(self) -> int:
        """The N of `--distill_generic teacher:N` and `chat:N`; 0 for a FILE, and for none."""
        kind, _, number = (self.distill_generic or "").partition(":")
        return int(number) if kind in SAMPLES and number.isdecimal() else 0

    @property
    def samples_conversations(self) -> bool:
        """Whether what is sampled are conversations."""
        return bool(self.generic_continuations) and str(self.distill_generic).startswith(CHAT)

    @property
    def generic_file(self) -> str | None:
        """The FILE of `--distill_generic`; None for samples, and for none."""
        return None if self.generic_continuations else self.distill_generic

    def leave_generic_unread(self) -> None:
        """Have no generic text, for an evaluation alone; `unread_generic` names what was asked for."""
        if self.distill_generic is not None:
            self.unread_generic = self.distill_generic
            self._have_no_generic()

    def _have_no_generic(self) -> None:
        for name in ("distill_generic", "distill_generic_length", "distill_generic_share"):
            setattr(self, name, getattr(type(self), name))

    def _check_generic(self) -> None:
        name = self.distill_generic
        if name is not None and not name.strip():
            raise UserError(
                "--distill_generic is empty; give a FILE of text, teacher:N or chat:N, such as teacher:1000, or none"
            )
        kind = (name or "").partition(":")[0]
        if name is not None and (name in SAMPLES or is_sampled(name)) and not self.generic_continuations:
            raise UserError(
                f"--distill_generic {name}: N of {kind}:N is a positive number of samples, such as {kind}:1000; give "
                "one, or none"
            )
        if not 0 < self.distill_generic_share < 1:
            raise UserError(
                f"--distill_generic_share {self.distill_generic_share} must lie between 0 and 1, and be neither: the "
                "fraction of the rows of a step, such as 0.25"
            )
        self.distill_generic_length = self.distill_generic_length or None
        if name is not None and name.strip().lower() == "none":
            self._have_no_generic()

    def check_eval_generic(self, evaluates: bool) -> None:
        """Raise a UserError where nothing is evaluated, or what is evaluated is trained on."""
        if self.eval_generic is None:
            return
        is_trained_on = self.distill_generic is not None and _is_same(self.eval_generic, self.distill_generic)
        if is_sampled(self.eval_generic) or is_trained_on:
            what = "is what --distill_generic trains on" if is_trained_on else "is no FILE"
            remedy = f"; give a FILE of text that is not trained on{f', or {NO_GENERIC}' * is_trained_on}"
            raise UserError(f"--eval_generic {self.eval_generic} {what}{remedy}")
        if not evaluates:
            raise UserError(
                f"--eval_generic {self.eval_generic} has no effect, since nothing is evaluated; give --do_eval True, "
                "or --eval_strategy steps"
            )

    def check_generic_with(self, streams: bool, max_length: int) -> None:
        """Raise a UserError where generic text does not fit into a row, or rows cannot be counted."""
        if self.distill_generic is None:
            return
        if self.distill_generic_length is not None and not 1 < self.distill_generic_length <= max_length:
            raise UserError(
                f"--distill_generic_length {self.distill_generic_length} must lie between 2 (the first token and one "
                f"more) and --model_max_length {max_length}, the tokens of a row; give such a number, 0 for "
                f"--model_max_length, or {NO_GENERIC}"
            )
        if streams:
            raise UserError(
                f"--distill_generic {self.distill_generic} needs a training set that can be read ahead, to divide its "
                f"rows evenly; give --streaming False, or {NO_GENERIC}"
            )

    def choose_teacher(self, keeps_model: bool) -> None:
        """Decide on the teacher's kind where none is given.

        Args:
            keeps_model: whether the model that the run starts from is there all the time, its quantizers off.
        """
        if self.distill and self.distill_teacher is None:
            is_free = keeps_model and self.teacher_model_name_or_path is None
            self.distill_teacher = "self" if is_free else "copy"

    def check_unquantized(self) -> None:
        """Raise a UserError where adapters of a model that is not quantized would have their own start as teacher."""
        if self.distill and self.distill_teacher == "self" and not self.distill_ce_weight:
            raise UserError(
                "--distill True: without --quant_scheme, the model that adapters start from differs from its teacher, "
                "itself, in nothing, so nothing is learned; name a --teacher_model_name_or_path, or give "
                "--distill_ce_weight, such as 0.5"
            )

    def _check_unused(self) -> None:
        """Settings that have no effect without a teacher, or without a cache."""
        unused = {}
        if not self.distill:
            unused |= dict.fromkeys(("distill_temperature", "distill_ce_weight"), "--distill True")
            unused |= dict.fromkeys(("distill_generic", "eval_generic"), "--distill True")
        if self.distill_generic is None:
            unused |= {"distill_generic_share": "--distill_generic"}
        if not self.generic_continuations:
            unused |= {"distill_generic_length": "--distill_generic teacher:N or chat:N"}
        if self.distill_teacher != "cache":
            unused |= dict.fromkeys(("distill_top_k", "distill_samples"), "--distill_teacher cache")
            if not self.generic_continuations:
                unused |= {"distill_cache_dir": "--distill_teacher cache"}
        for name, wanted in unused.items():
            if (value := getattr(self, name)) != getattr(type(self), name):
                how = f" ({_LEFT_OUT[name]}, where a recipe sets it)" if name in _LEFT_OUT else ""
                raise UserError(f"--{name} {value} has no effect without {wanted}; give that too, or leave it out{how}")


def _is_same(first: str, second: str) -> bool:
    """Whether two names are one text: the same words, or paths of one file."""
    return first == second or os.path.realpath(first) == os.path.realpath(second)
