"""Parse the command line into six groups of arguments, or end with one clear line.

A recipe (`--config recipes/mxfp4.yaml`) is a file of arguments by name; flags beside it win.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from data.command_line import DataclassParser
from qat import SCHEMES
from qat.checkpoints.model_card import CardFacts
from qat.command_line import OneLineParser
from qat.errors import UserError

from .config_file import SUFFIXES, as_flags, read_config
from .data import DataArguments
from .distillation import SELF_IN_TRAINING, DistillationArguments
from .lora import LoraArguments, check_with_adapters
from .memory import fsdp_version
from .model import ModelArguments
from .quantization import QuantizationArguments
from .trainer_options import check_metric, check_with_generic, check_with_stream, check_with_teacher
from .training import TrainingArguments

GROUPS = (ModelArguments, TrainingArguments, DataArguments, QuantizationArguments, DistillationArguments, LoraArguments)

# What decides which rows come next, as settings of data do.
GENERIC = ("distill_generic", "distill_generic_length", "distill_generic_share")


class Arguments(NamedTuple):
    """All arguments of main.py."""

    model: ModelArguments
    training: TrainingArguments
    data: DataArguments
    quantization: QuantizationArguments
    distillation: DistillationArguments
    lora: LoraArguments

    @property
    def data_options(self) -> dict:
        """For `make_supervised_data_module`."""
        seed = self.training.seed if self.training.data_seed is None else self.training.data_seed
        options = {"batch_size": self.training.per_device_train_batch_size, "seed": seed}
        return {**vars(self.data), **options, "evaluate": self.training.do_eval}

    @property
    def trainer_options(self) -> dict:
        """For QATTrainer, beside model, teacher and data."""
        distillation = dict(vars(self.distillation))
        return {
            "distill_temperature": self.distillation.distill_temperature,
            "distill_ce_weight": self.distillation.distill_ce_weight,
            "log_quantization": self.quantization.log_quantization,
            "parameter_groups": self.quantization.parameter_groups,
            "data_settings": {**vars(self.data), **{name: distillation.pop(name) for name in GENERIC}},
            "learning_settings": {
                **distillation,
                **vars(self.quantization),
                **vars(self.lora),
                "model_name_or_path": self.model.model_name_or_path,
            },
        }

    @property
    def facts(self) -> CardFacts:
        """For the model card."""
        data, generic = self.data, self.distillation.distill_generic
        return CardFacts(self.model.model_name_or_path, data.dataset, data.eval_dataset, generic)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse flags, and the file that `--config` names or that is the first word.

    A wrong value ends the program with one clear line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith(SUFFIXES):
        argv = ["--config", *argv]
    parser = DataclassParser(GROUPS, prog="main.py")
    parser.add_argument(
        "--config", help="A .yaml or .json file of arguments by name, such as recipes/mxfp4.yaml; flags win over it."
    )
    try:
        config, flags = _split_config(argv)
        given = [] if config is None else as_flags(read_config(config), config, GROUPS)
        _check_precision([*given, *flags])
        *groups, _ = parser.parse([*given, *flags])
        arguments = Arguments(*groups)
        _check_together(arguments)
        if arguments.data.streaming:  # each process reads for itself: batches of different lengths cannot be dealt out
            arguments.training.accelerator_config.dispatch_batches = False
        return arguments
    except UserError as error:
        parser.error(str(error))


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other words.

    Raises:
        UserError: two files are given.
    """
    parser = OneLineParser(add_help=False)
    parser.add_argument("--config", action="append", default=[])
    found, rest = parser.parse_known_args(argv)
    if len(found.config) > 1:
        raise UserError(f"--config {found.config[1]!r}: {found.config[0]!r} is given already; give one file, flags win")
    return (found.config[0] if found.config else None), rest


def _check_precision(words: list[str]) -> None:
    """Raise a UserError if both --fp16 and --bf16 are asked for; --bf16 is the default, so afterwards nobody knows."""
    parser = OneLineParser(add_help=False)
    for name in ("fp16", "bf16"):
        parser.add_argument(f"--{name}", nargs="?", const="true", default="")
    found, _ = parser.parse_known_args(words)
    if all(str(value).lower() in ("true", "t", "yes", "y", "1") for value in vars(found).values()):
        raise UserError("--fp16 True and --bf16 True ask for two precisions; give one of them, or --bf16 False")


def _check_together(arguments: Arguments) -> None:
    """Raise a UserError for settings of two groups that exclude each other."""
    training, distillation, lora = arguments.training, arguments.distillation, arguments.lora
    lora.check_base(distillation)
    distillation.choose_teacher(lora.is_on and arguments.quantization.weight_init == "none")
    if lora.is_on:
        lora.check_with(arguments.quantization)
        lora.check_trains(training.do_train)
        check_with_adapters(training.fsdp_gather_dtype)
        lora.check_masters(training)
    check_metric(training, distillation.distill, distillation.eval_generic is not None)
    if arguments.data.streaming:
        check_with_stream(training)
    if training.do_train and training.learning_rate == 0 and not arguments.quantization.learns:
        raise UserError("--learning_rate 0.0: nothing would be learned; give a positive number, such as 1e-5")
    if training.ptq:
        _check_ptq(arguments)
    if arguments.quantization.export_format == "auto_round" and not training.saves:
        raise UserError(
            "--export_format auto_round has no effect without --do_train True: an evaluation packs nothing; leave it "
            "out, or pack the folder with scripts/export.py"
        )
    for name, is_on in (
        ("moment_dtype float32", training.moment_dtype != "bfloat16"),
        ("optimizer_in_backward True", training.optimizer_in_backward),
    ):
        if is_on and not training.do_train:
            raise UserError(
                f"--{name} has no effect without --do_train True: an evaluation updates no weights; leave it out"
            )
    if (every := arguments.quantization.input_scale_refresh) and not training.do_train:
        raise UserError(
            f"--input_scale_refresh {every} has no effect without --do_train True: "
            "scales are calibrated again while weights train; leave it out"
        )
    if arguments.quantization.fp8_matmul == "on" and not training.bf16:
        raise UserError(
            "--fp8_matmul on: products in FP8 give BF16, which is not what --bf16 False or --fp16 True computes in; "
            "give --bf16 True, or leave --fp8_matmul out"
        )
    for name in (name for name, on in arguments.quantization.learned.items() if on and not training.bf16):
        raise UserError(
            f"--{name} True: weights are saved as they are quantized in bfloat16, which is not what --bf16 False or "
            f"--fp16 True trains; give --bf16 True, or leave --{name} out"
        )
    for name in (
        name for name, on in arguments.quantization.learned.items() if on and training.master_dtype != "float32"
    ):
        if fsdp_version():
            raise UserError(
                f"--{name} True with --master_dtype bfloat16 under FSDP: what is learned is FP32, and FSDP2 shards "
                "parameters of one dtype together; give --master_dtype float32, or start without FSDP"
            )
    for setting, is_on in arguments.quantization.learned.items():
        if is_on and not training.do_train:
            raise UserError(
                f"--{setting} True has no effect without --do_train True: an evaluation learns nothing; leave it out"
            )
    if distillation.distill:
        check_with_teacher(training)
    if not training.do_train:
        distillation.leave_generic_unread()
    distillation.check_eval_generic(training.do_eval)
    distillation.check_generic_with(arguments.data.streaming, training.model_max_length)
    if distillation.distill_generic is not None:
        check_with_generic(training)
    if distillation.generic_continuations and distillation.distill_generic_length is None:
        distillation.distill_generic_length = training.model_max_length  # as a resumed run may give it
    if distillation.distill_teacher == "self" and training.do_train and not lora.is_on:
        raise UserError(SELF_IN_TRAINING)
    if not (training.saves or training.do_eval):
        raise UserError("nothing is asked for: give --do_train True, --do_eval True, or both; or --ptq True")


def _check_ptq(arguments: Arguments) -> None:
    """Raise a UserError for what does not go with a run that quantizes, packs and trains nothing."""
    training, quantization = arguments.training, arguments.quantization
    if training.do_train:
        raise UserError(
            "--ptq True and --do_train True: post-training quantization trains nothing; give --do_train False where a "
            "recipe trains, or leave --ptq out"
        )
    if not quantization.names_schemes:
        raise UserError(
            f"--ptq True needs a scheme: give --quant_scheme (one of {', '.join(SCHEMES)}) or --quant_mapping; a "
            "folder that QAT has saved is packed by scripts/export.py"
        )
    if arguments.lora.is_on:
        raise UserError(
            "--ptq True trains no adapters, and reads none; the folder that their training has saved is merged: name "
            "it with --model_name_or_path"
        )
    if fsdp_version():
        raise UserError("--ptq True under FSDP: nothing is trained, and so nothing sharded; start it as python main.py")
    if training.world_size > 1:
        raise UserError(
            f"--ptq True with {training.world_size} processes: each would prepare the whole model; start it as python "
            "main.py, or with --num_processes 1"
        )
