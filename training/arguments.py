"""The command line: five groups of arguments, each checked before anything slow begins."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
import transformers
from accelerate import PartialState
from transformers import HfArgumentParser

from data.bad_samples import POLICIES
from data.formatting import TRAIN_ON
from data.readers import HELP as DATASET_HELP
from data.supervised import check_size
from qat import SCHEMES
from qat.formats import SCALE_RULES
from qat.mapping import DEFAULT_IGNORE, load_mapping
from qat.packed_config import EXPORT_FORMATS
from qat.schemes import GRADIENT_ESTIMATORS, INPUT_SCALE_RULES

from .sampled_tokens import CacheSettings
from .sharding import GATHER_DTYPES
from .teachers import TEACHERS


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(
        default="meta-llama/Llama-3.1-8B",
        metadata={"help": "Hub id or local folder of a causal language model; a QAT folder brings its scheme along."},
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "Name of a GGUF file inside the local folder model_name_or_path; loaded dequantized."},
    )

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with a model or tokenizer; it can do all that you can."},
    )

    def __post_init__(self) -> None:
        if self.gguf_file is not None and not Path(self.model_name_or_path, self.gguf_file).is_file():
            raise ValueError(
                f"--gguf_file {self.gguf_file!r} is not in --model_name_or_path {self.model_name_or_path!r}; "
                "name a .gguf file that lies in that local folder"
            )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's own training arguments, with defaults for this job."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models are cached."})
    model_max_length: int = field(
        default=2048, metadata={"help": "Samples are cut at this many tokens; batches are padded to their longest."}
    )
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop the last incomplete training batch. Evaluation always uses every sample."},
    )
    bf16: bool = field(
        default=True,
        metadata={"help": "Compute in bfloat16 (autocast) over FP32 master weights, on CPUs too."},
    )

    report: bool = field(
        default=True, metadata={"help": "After training, write report.md and report.png with curves and final figures."}
    )
    fsdp_gather_dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype in which FSDP gathers parameters: float32 computes what one process does; bfloat16 halves "
            "the traffic and computes norms, embeddings and the residual stream in BF16. See docs/distributed.md.",
            "choices": list(GATHER_DTYPES),
        },
    )
    group_by_length: bool = field(
        default=False,
        metadata={"help": "Batch samples of about the same length together (same as --train_sampling_strategy)."},
    )
    max_nan_steps: int = field(
        default=0,
        metadata={
            "help": "Steps in a row whose loss or gradient may be NaN or infinite; they are not applied. One more ends "
            "the run, whose checkpoints stay good."
        },
    )

    def __post_init__(self) -> None:
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.max_nan_steps < 0:
            raise ValueError(f"--max_nan_steps {self.max_nan_steps} is negative; 0 lets no such step pass")
        if self.model_max_length < 2:
            raise ValueError(f"--model_max_length {self.model_max_length} is too short; samples need at least 2 tokens")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.fp16:
            self.bf16 = False
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric.endswith(("kl", "perplexity")) and self.greater_is_better is None:
            self.greater_is_better = False  # as transformers has it for losses only
        if self.use_cpu:  # transformers 5.23 forgets --ddp_timeout on CPUs; the process group made here stays
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if not (self.bf16 or self.fp16):  # or accelerate would follow its configuration file's mixed_precision
            self.mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "no"

    @property
    def n_gpu(self) -> int:
        """At most one GPU a process: transformers would spread a single process over all with torch's DataParallel,
        which multiplies the batch and copies the model at every step. `accelerate launch` is for several."""
        return min(super().n_gpu, 1)


@dataclass
class DataArguments:
    """Which data to learn from."""

    dataset: str = field(default="Daring-Anteater", metadata={"help": f"{DATASET_HELP}. See docs/data.md."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Evaluate on this dataset, written like --dataset, not on held-out samples."}
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "TRAIN or TRAIN,EVAL: names of the dataset's splits. TRAIN alone holds samples out of it. Default: "
            "train, evaluated on validation where there is one, else on held-out samples."
        },
    )
    train_size: float = field(
        default=0, metadata={"help": "Training samples: a number, or a share between 0 and 1; 0 uses all."}
    )
    eval_size: float = field(
        default=0,
        metadata={"help": "Evaluation samples: a number, or a share between 0 and 1; 0 uses the dataset's default."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "'none' joins turns by newlines (the format of INC's example); a .jinja file replaces the "
            "tokenizer's template. Default: the tokenizer's own, where it has one."
        },
    )
    train_on: str = field(
        default="assistant",
        metadata={"help": "Which tokens are learned: those of assistant turns, or all.", "choices": list(TRAIN_ON)},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack training samples into full rows of model_max_length tokens, without attention across."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenize while training, without a cache; needs --max_steps."},
    )
    on_bad_sample: str = field(
        default="error",
        metadata={"help": "End at the first bad sample, or skip and count them.", "choices": list(POLICIES)},
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenized data is kept. Default: beside the caches of `datasets`."}
    )
    preprocessing_num_workers: int = field(
        default=0, metadata={"help": "Processes that tokenize; 0 chooses by cores and number of samples."}
    )

    def __post_init__(self) -> None:
        for argument in ("train_size", "eval_size"):
            check_size(argument, getattr(self, argument))
        if self.preprocessing_num_workers < 0:
            raise ValueError(f"--preprocessing_num_workers {self.preprocessing_num_workers} is negative; 0 chooses one")


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

    weight_scale_rule: str | None = field(
        default=None,
        metadata={
            "help": f"Scale rule of weights, one of {', '.join(SCALE_RULES)}; default: the scheme's own. "
            "search picks the better of two exponents for each block."
        },
    )
    input_scale_rule: str | None = field(
        default=None,
        metadata={
            "help": f"Scale rule of activations, one of {', '.join(INPUT_SCALE_RULES)}; default: the scheme's own. "
            "Choose the rule of the engine that will serve the model."
        },
    )
    smooth_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Smooth activations before training: move this share of their outliers into the weights, exactly "
            "and at no cost in serving (SmoothQuant). 0: off; 0.7 is a good start for MXFP4."
        },
    )
    quant_mapping: str | None = field(
        default=None,
        metadata={
            "help": "Mixed precision: a JSON file of schemes by layer name or glob, in place of --quant_scheme; "
            "python -m training.sensitivity proposes one."
        },
    )
    weight_gradient_estimator: str = field(
        default="ste",
        metadata={
            "help": "Gradients of weights pass their quantizer: ste (straight through), or clipped_ste (not where the "
            "weight saturates).",
            "choices": list(GRADIENT_ESTIMATORS),
        },
    )
    input_gradient_estimator: str = field(
        default="ste",
        metadata={"help": "The same for gradients of activations.", "choices": list(GRADIENT_ESTIMATORS)},
    )
    learn_exponent: bool = field(
        default=False,
        metadata={
            "help": "Train the block exponents of weights too; what is saved is a plain checkpoint all the same."
        },
    )
    exponent_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the exponents, which move in whole steps; no weight decay."}
    )
    oscillation_damping: float = field(
        default=0.0,
        metadata={
            "help": "After each step move weights by this fraction, reached linearly at the end of the training, to "
            "the values they are quantized to; 0 does not."
        },
    )
    log_quantization: bool = field(
        default=True,
        metadata={"help": "Log how many codes flip and oscillate and how many values saturate, by group of layers."},
    )
    export_format: str = field(
        default="compressed-tensors",
        metadata={
            "help": "After quantization-aware training, pack the model into output_dir/SCHEME: "
            f"{', '.join(EXPORT_FORMATS)}, or none."
        },
    )

    def __post_init__(self) -> None:
        if self.export_format not in (*EXPORT_FORMATS, "none"):
            raise ValueError(
                f"--export_format {self.export_format!r} is unknown; choose one of {', '.join(EXPORT_FORMATS)}, none"
            )
        if not 0 <= self.smooth_alpha <= 1:
            raise ValueError(f"--smooth_alpha {self.smooth_alpha} is out of range; choose 0 (off) to 1, such as 0.7")
        for name, choices in (("weight_scale_rule", SCALE_RULES), ("input_scale_rule", INPUT_SCALE_RULES)):
            rule = getattr(self, name)
            if rule is not None and rule not in choices:
                raise ValueError(f"--{name} {rule!r} is unknown; choose one of {', '.join(choices)}")
        if not self.exponent_learning_rate > 0:
            raise ValueError(f"--exponent_learning_rate {self.exponent_learning_rate} must be greater than 0")
        if not 0 <= self.oscillation_damping <= 1:
            raise ValueError(f"--oscillation_damping {self.oscillation_damping} must lie between 0 (none) and 1")
        if self.quant_mapping is not None:
            if self.quant_scheme is not None:
                raise ValueError("--quant_mapping names the schemes itself; give either it or --quant_scheme")
            load_mapping(self.quant_mapping)
            return
        if self.quant_scheme is None:
            if self.weight_scale_rule or self.input_scale_rule:
                raise ValueError("--weight_scale_rule and --input_scale_rule need --quant_scheme")
            return
        if self.quant_scheme.upper() not in SCHEMES:
            raise ValueError(f"--quant_scheme {self.quant_scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
        self.quant_scheme = self.quant_scheme.upper()

    def layers(self) -> tuple[dict[str, str], tuple[str, ...]] | None:
        """Mapping and ignored layers as `prepare_qat` takes them; None where neither scheme nor mapping is given."""
        if self.quant_mapping is not None:
            return load_mapping(self.quant_mapping)
        return None if self.quant_scheme is None else ({"torch.nn.Linear": self.quant_scheme}, DEFAULT_IGNORE)

    def training_options(self) -> dict[str, str | bool | float]:
        """Arguments of `prepare_qat` about how weights are trained."""
        names = ("weight_gradient_estimator", "input_gradient_estimator", "learn_exponent", "oscillation_damping")
        return {name: getattr(self, name) for name in names}


@dataclass
class DistillationArguments:
    """Whether to learn from an unquantized teacher instead of from the data's own tokens."""

    distill: bool = field(
        default=False,
        metadata={"help": "Learn the token distributions of the model that this stage starts from, unquantized."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another teacher: hub id or local folder; implies --distill True."}
    )
    distill_teacher: str = field(
        default="copy",
        metadata={
            "help": "How the teacher is there: copy keeps a frozen model in memory; cache computes its distributions "
            "once and keeps a sample of each on disk; self is the student with its quantizers off. See "
            "docs/distillation.md.",
            "choices": list(TEACHERS),
        },
    )
    distill_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where --distill_teacher cache keeps distributions. Default: beside the data's."},
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
        default=0.0, metadata={"help": "Share of the loss that is cross-entropy with the data's tokens, from 0 to 1."}
    )

    def __post_init__(self) -> None:
        self.distill = self.distill or self.teacher_model_name_or_path is not None or self.distill_teacher != "copy"
        if self.distill_teacher not in TEACHERS:
            raise ValueError(
                f"--distill_teacher {self.distill_teacher!r} is unknown; choose one of {', '.join(TEACHERS)}"
            )
        if self.distill_teacher == "self" and self.teacher_model_name_or_path is not None:
            raise ValueError(
                f"--distill_teacher self and --teacher_model_name_or_path {self.teacher_model_name_or_path!r} name two "
                "teachers; give one of them"
            )
        if not self.distill_temperature > 0:
            raise ValueError(f"--distill_temperature {self.distill_temperature} must be greater than 0")
        if not 0 <= self.distill_ce_weight <= 1:
            raise ValueError(f"--distill_ce_weight {self.distill_ce_weight} must lie between 0 (KL only) and 1 (no KL)")
        self.cache_settings = CacheSettings(self.distill_top_k, self.distill_samples, self.distill_temperature)


Arguments = tuple[ModelArguments, TrainingArguments, DataArguments, QuantizationArguments, DistillationArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse flags, or a single .yaml or .json file of them; a wrong value ends the program with one clear line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(get_args(Arguments))
    try:
        if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
            arguments = parser.parse_yaml_file(argv[0])
        elif len(argv) == 1 and argv[0].endswith(".json"):
            arguments = parser.parse_json_file(argv[0])
        else:
            arguments = parser.parse_args_into_dataclasses(argv)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return arguments
