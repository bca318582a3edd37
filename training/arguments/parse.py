"""Parse the command line into five groups of arguments, or end with one clear line.

A recipe (`--config recipes/mxfp4.yaml`) is a file of arguments by name; flags beside it win.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser

from qat.checkpoints.model_card import CardFacts
from qat.errors import UserError

from .data import DataArguments
from .distillation import SELF_IN_TRAINING, DistillationArguments
from .model import ModelArguments
from .quantization import QuantizationArguments
from .trainer_options import check_metric, check_with_stream, check_with_teacher
from .training import TrainingArguments

GROUPS = (ModelArguments, TrainingArguments, DataArguments, QuantizationArguments, DistillationArguments)
SUFFIXES = (".yaml", ".yml", ".json")


class Arguments(NamedTuple):
    """All arguments of main.py."""

    model: ModelArguments
    training: TrainingArguments
    data: DataArguments
    quantization: QuantizationArguments
    distillation: DistillationArguments

    @property
    def data_options(self) -> dict:
        """For `make_supervised_data_module`."""
        return {**vars(self.data), "batch_size": self.training.per_device_train_batch_size}

    @property
    def trainer_options(self) -> dict:
        """For QATTrainer, beside model, teacher and data."""
        return {
            "distill_temperature": self.distillation.distill_temperature,
            "distill_ce_weight": self.distillation.distill_ce_weight,
            "log_quantization": self.quantization.log_quantization,
            "parameter_groups": self.quantization.parameter_groups,
            "data_settings": vars(self.data),
            "learning_settings": {
                **vars(self.distillation),
                **vars(self.quantization),
                "model_name_or_path": self.model.model_name_or_path,
            },
        }

    @property
    def facts(self) -> CardFacts:
        """For the model card."""
        return CardFacts(self.model.model_name_or_path, self.data.dataset, self.data.eval_dataset)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse flags, and the file that `--config` names or that is the only argument.

    A wrong value ends the program with one clear line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) == 1 and argv[0].endswith(SUFFIXES):
        argv = ["--config", argv[0]]
    parser = HfArgumentParser(GROUPS)
    parser.add_argument(
        "--config", help="A .yaml or .json file of arguments by name, such as recipes/mxfp4.yaml; flags win over it."
    )
    try:
        config, flags = _split_config(argv)
        given = [] if config is None else as_flags(read_config(config), config)
        *groups, _ = parser.parse_args_into_dataclasses([*given, *flags])
        arguments = Arguments(*groups)
        _check_together(arguments)
        if arguments.data.streaming:  # each process reads for itself: batches of different lengths cannot be dealt out
            arguments.training.accelerator_config.dispatch_batches = False
        return arguments
    except ValueError as error:
        parser.error(str(error))


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(argv)
    return found.config, rest


def read_config(path: str | Path) -> dict:
    """The arguments in a file, by name.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not a mapping from names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_UniqueKeys)  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {str(path)!r} is not a mapping from arguments to values, such as max_steps: 1000")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """A mapping that holds a key twice is an error; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """See yaml.SafeLoader."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"it holds {key!r} twice")
        return super().construct_mapping(node, deep)


def as_flags(content: dict, path: str | Path) -> list[str]:
    """The command-line words for the arguments in a file.

    Raises:
        UserError: a name that is not an argument; the message suggests the nearest one.
    """
    known = {field.name for group in GROUPS for field in fields(group) if field.init}
    words: list[str] = []
    for name, value in content.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"--config {str(path)!r}: {name!r} is not an argument of main.py{hint}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def _check_together(arguments: Arguments) -> None:
    """Raise a UserError for settings of two groups that exclude each other."""
    training, distillation = arguments.training, arguments.distillation
    check_metric(training, distillation.distill)
    if arguments.data.streaming:
        check_with_stream(training)
    if arguments.quantization.learn_exponent and not training.bf16:
        raise UserError(
            "--learn_exponent True: weights are saved as they are quantized in bfloat16, which is not what --bf16 "
            "False or --fp16 True trains; give --bf16 True, or leave --learn_exponent out"
        )
    if distillation.distill:
        check_with_teacher(training)
    if distillation.distill_teacher == "self" and training.do_train:
        raise UserError(SELF_IN_TRAINING)
    if not (training.do_train or training.do_eval):
        raise UserError("nothing is asked for: give --do_train True, --do_eval True, or both")
