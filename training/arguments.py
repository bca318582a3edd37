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

from .data_arguments import DataArguments
from .distillation_arguments import DistillationArguments
from .exponents import check_compute_dtype
from .quantization_arguments import QuantizationArguments
from .sharding import GATHER_DTYPES
from .teachers import SELF_IN_TRAINING


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


Arguments = tuple[ModelArguments, TrainingArguments, DataArguments, QuantizationArguments, DistillationArguments]


def _check_together(_, training_args, __, quant_args, distill_args) -> None:
    """Raises ValueError for settings of two groups that exclude each other."""
    metric = training_args.metric_for_best_model
    if metric in ("kl", "eval_kl") and not distill_args.distill:
        raise ValueError(
            f"--metric_for_best_model {metric} is the divergence from a teacher, and there is none: give --distill "
            "True, or choose loss or perplexity"
        )
    if quant_args.learn_exponent:
        check_compute_dtype(training_args.bf16)
    if distill_args.distill_teacher == "self" and training_args.do_train:
        raise ValueError(SELF_IN_TRAINING)


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
        _check_together(*arguments)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return arguments
