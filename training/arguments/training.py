"""Arguments of main.py: Hugging Face's own training arguments, with defaults for this job and a few more."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

from qat.errors import UserError

from .memory import DTYPES, check_memory
from .option_conditions import plain
from .option_table import MUON
from .trainer_options import check_trainer_options

GATHER_DTYPES = ("float32", "bfloat16")


_OF_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # dicts that may also be given as a JSON file


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

    ptq: bool = field(
        default=False,
        metadata={
            "help": "Post-training quantization: prepare the model as for training, evaluate it with --do_eval, save "
            "and pack it, and train nothing. See docs/quantization.md."
        },
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
    optim: str = field(  # the field of transformers, with a name more
        default=transformers.TrainingArguments.optim,
        metadata={
            "help": "The optimizer, see docs/trainer_options.md.",
            "choices": [*(name.value for name in transformers.training_args.OptimizerNames), MUON],
        },
    )
    master_dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights that the optimizer updates: float32; or bfloat16, which needs no FP32 "
            "masters and rounds each update stochastically. See docs/memory.md.",
            "choices": list(DTYPES),
        },
    )
    moment_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Dtype of AdamW's two moments with --master_dtype bfloat16; bfloat16 is rounded stochastically.",
            "choices": list(DTYPES),
        },
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each parameter, and free its gradient, as soon as backward has computed it. Needs "
            "--max_grad_norm 0 and no accumulation. See docs/memory.md."
        },
    )

    def __post_init__(self) -> None:
        if self.output_dir is not None and not self.output_dir.strip():
            raise UserError("--output_dir is empty; give the folder to write to")
        self._check_json()
        check_trainer_options(self)
        if self.group_by_length:
            if self.train_sampling_strategy not in ("random", "group_by_length"):
                raise UserError(
                    f"--group_by_length True and --train_sampling_strategy {self.train_sampling_strategy} ask for two "
                    "orders of samples; leave one of them out"
                )
            self.train_sampling_strategy = "group_by_length"
        self._check_choices()
        if self.max_nan_steps < 0:
            raise UserError(f"--max_nan_steps {self.max_nan_steps} is negative; 0 lets no such step pass")
        if self.model_max_length < 2:
            raise UserError(f"--model_max_length {self.model_max_length} is too short; samples need at least 2 tokens")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.fp16:
            self.bf16 = False
        check_memory(self)
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric.endswith(("kl", "perplexity")) and self.greater_is_better is None:
            self.greater_is_better = False  # as transformers has it for losses only
        self._read_by_transformers()
        if not (self.bf16 or self.fp16):  # or accelerate would follow its configuration file's mixed_precision
            self.mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "no"

    @property
    def saves(self) -> bool:
        """Whether the run writes a model."""
        return self.do_train or self.ptq

    def _check_choices(self) -> None:
        """Raise a UserError for a dtype of masters or moments that is none; main.py's parser has checked its own."""
        for name in ("master_dtype", "moment_dtype"):
            if (value := getattr(self, name)) not in DTYPES:
                raise UserError(f"--{name} {value!r} is unknown; choose one of {', '.join(DTYPES)}")

    def _check_json(self) -> None:
        """Raise a UserError for an option that is to be a JSON object and is other text."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            try:
                text = value if value.startswith("{") or name not in _OF_FILES else Path(value).read_text("utf-8")
                is_object = isinstance(json.loads(text), dict)
            except (OSError, ValueError, RecursionError):
                is_object = False
            if not is_object:
                or_file = ", or a file of one" if name in _OF_FILES else ""
                raise UserError(f"--{name} {value!r} is not a JSON object{or_file}; give one, such as '{{\"key\": 1}}'")

    def _read_by_transformers(self) -> None:
        """transformers' own reading of its options.

        Raises:
            UserError: it refuses one of them; the message begins with the option.
        """
        try:
            if self.use_cpu:  # transformers 5.23 forgets --ddp_timeout on CPUs; the process group made here stays
                PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
            optim, self.optim = self.optim, "adamw_torch_fused" if self.optim == MUON else self.optim
            super().__post_init__()
            self.optim = optim if optim == MUON else self.optim  # transformers does not know it
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise UserError(self._named(str(error))) from error

    def _named(self, message: str) -> str:
        """A message of transformers that begins with the option that it is about."""
        options = {field.name: getattr(self, field.name, None) for field in fields(self)}
        value = message.partition(" is not a valid ")[0]  # of an enumeration, whose options are not named
        name = next((name for name, own in options.items() if value != message and own == value), None)
        if name is None:
            found = re.search(rf"\b({'|'.join(sorted(options, key=len, reverse=True))})\b", message)
            name = found[1] if found else None
        if name is None:
            return f"the arguments of training cannot be used: {message}"
        return message if message.startswith(f"--{name}") else f"--{name} {plain(options[name])}: {message}"

    @property
    def n_gpu(self) -> int:
        """At most one GPU a process: transformers would spread a single process over all with torch's DataParallel,
        which multiplies the batch and copies the model at every step. `accelerate launch` is for several."""
        return min(super().n_gpu, 1)
