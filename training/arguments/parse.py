"""Parse the command line into five groups of arguments, or end with one clear line."""

from __future__ import annotations

import sys
from typing import get_args

from transformers import HfArgumentParser

from qat.layers.finish import check_compute_dtype

from .data import DataArguments
from .distillation import SELF_IN_TRAINING, DistillationArguments
from .model import ModelArguments
from .quantization import QuantizationArguments
from .training import TrainingArguments

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
