"""All checks of a run that need no weights, before any weights are read.

A setting that cannot work is found within seconds, whatever the size of the model: paths first, then the model's
skeleton, prepared as the model is going to be, then the data.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.tokenizer import load_tokenizer
from qat import QATConfig
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.load import TEACHER_ARGUMENT
from qat.checkpoints.model_config import read_config
from qat.errors import UserError
from qat.files.model_folder import check_adapter_folder, check_model_folder
from qat.files.paths import check_apart, check_writable
from qat.layers.fp8_matmul import use_fp8_matmul
from qat.layers.learned import holds_rounded_values, learns
from qat.layers.restore import check_trainable

from .adapters.begin import Adapters
from .adapters.files import check_same_adapters
from .arguments.parse import Arguments
from .resume.output import OutputFolder
from .resume.steps import check_steps
from .start.calibration import check_calibration
from .start.data_checks import check_fit, local_paths
from .start.skeleton import check_autocast, check_length, check_loads_again, skeleton_of
from .start.start import Start, saved_config
from .teachers.choose import check_cached_size
from .teachers.load import check_teacher

logger = logging.getLogger(__name__)


# ---- Paths ----


def check_paths(arguments: Arguments) -> None:
    """Refuse models that are not there, and to write where something is read.

    Raises:
        UserError: as described. An evaluation may write into the folder of its model: it makes a new folder there.
    """
    model_args, args, data_args, _, distill_args, lora_args = arguments
    check_model_folder(model_args.model_name_or_path)
    if lora_args.adapter_name_or_path is not None:
        check_adapter_folder(lora_args.adapter_name_or_path)
    teacher = distill_args.teacher_model_name_or_path
    if teacher is not None:
        check_model_folder(teacher, TEACHER_ARGUMENT)
    inputs = [("--dataset", path) for path in local_paths(data_args.dataset)]
    inputs += [("--eval_dataset", path) for path in local_paths(data_args.eval_dataset)]
    inputs += [("--distill_generic", path) for path in local_paths(distill_args.generic_file)]
    inputs += [("--eval_generic", path) for path in local_paths(distill_args.eval_generic)]
    if args.saves:
        inputs.append(("--model_name_or_path", Path(model_args.model_name_or_path)))
        inputs += [] if teacher is None else [("--teacher_model_name_or_path", Path(teacher))]
        adapter = lora_args.adapter_name_or_path
        inputs += [] if adapter is None else [("--adapter_name_or_path", Path(adapter))]
    check_apart("--output_dir", args.output_dir, inputs)


# ---- The model, without its weights ----


def check_model(arguments: Arguments, start: Start, output: OutputFolder) -> PreTrainedModel:
    """The model without weights, prepared as it is going to be trained: what cannot be done with it is refused.

    Returns:
        The model, its parameters on the meta device.

    Raises:
        UserError: a cache cannot be written; adapters do not fit; the model's configuration cannot be read, or is not
            of a causal language model, or of one that autocast fails for or that could not be loaded again;
            --model_max_length is more than its positions; the teacher does not fit; the scheme, the mapping or the
            export format does not; the packed model's folder is occupied; or the checkpoint to resume from is not there
            or of another training.
    """
    _, args, data_args, quant_args, distill_args, lora_args = arguments
    for name, folder in (
        ("--data_cache_dir", data_args.data_cache_dir), ("--distill_cache_dir", distill_args.distill_cache_dir)
    ):  # fmt: skip
        if folder is not None:
            check_writable(name, folder)
    skeleton = skeleton_of(start)
    check_autocast(args, skeleton.config)
    if args.saves:
        check_loads_again(start, skeleton.config)
    check_length(args.model_max_length, type(args).model_max_length, skeleton.config)
    if distill_args.distill:
        check_cached_size(skeleton.config, distill_args)
        if distill_args.teacher_model_name_or_path is not None:
            _check_teacher(start, skeleton, distill_args.teacher_model_name_or_path)
    with _mapping_named(quant_args.quant_mapping):
        with _silenced():  # that of the model itself is printed
            start.quantize(skeleton, quant_args)
        use_fp8_matmul(skeleton, quant_args.fp8_matmul, args.device)
        if args.do_train:
            check_trainable(skeleton)
        config = cast("QATConfig | None", getattr(skeleton, "qat_config", None))
        if not (start.is_packed and config is None):  # which is known once it is unpacked
            check_calibration(skeleton, quant_args)
        exports = args.saves and config is not None and quant_args.export_format != "none"
        if exports:
            check_exportable(skeleton, quant_args.export_format, _plain_folder(start))
    if args.saves:
        output.check_replaceable()
    if exports:
        output.check_packable(config)
    if args.ptq:
        output.check_untrained()
    if lora_args.is_on:
        with _silenced():
            Adapters(lora_args, start).check(skeleton)
        if args.do_train and config is None:
            distill_args.check_unquantized()
    if args.do_train and not (start.is_packed and config is None):  # which is known once it is unpacked
        checkpoint = output.check_resumable(args, config, lora_args.is_on)
        if checkpoint is not None and lora_args.is_on:
            check_same_adapters(checkpoint, skeleton)
    return skeleton


def _plain_folder(start: Start) -> CheckpointFolder | None:
    """The folder of the model, where it is one of unquantized safetensors files; what is saved has its names."""
    path = Path(start.model_args.model_name_or_path)
    if not path.is_dir() or start.model_args.gguf_file is not None:
        return None
    folder = CheckpointFolder.open(path, "--model_name_or_path")
    return folder if folder.quantizer is None else None


def _check_teacher(start: Start, skeleton: PreTrainedModel, name: str) -> None:
    model_args = start.model_args
    options = {"cache_dir": start.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    teacher = SimpleNamespace(config=read_config(name, f"{TEACHER_ARGUMENT} {name!r}", **options))
    own = load_tokenizer(model_args.model_name_or_path, gguf_file=model_args.gguf_file, **options)
    check_teacher(skeleton, teacher, own, load_tokenizer(name, argument=TEACHER_ARGUMENT, **options))
    saved = saved_config(name, start.cache_dir)
    if holds_rounded_values(saved) or learns(saved):
        raise UserError(
            f"{TEACHER_ARGUMENT} {name!r}: its weights were rounded before they were saved; give the unquantized model "
            "that they came from"
        )
    if saved is not None:
        logger.warning("The teacher %s was trained to be quantized (%s); it computes unquantized", name, saved.summary)


@contextlib.contextmanager
def _mapping_named(mapping: str | None) -> Iterator[None]:
    """Let errors inside begin with the file that says which layers are quantized, if one does."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--quant_mapping {mapping!r}: {error}" if mapping else str(error)) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Neither prints nor warnings inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


# ---- The data ----


def check_data(
    arguments: Arguments,
    data: dict,
    tokenizer: PreTrainedTokenizerBase,
    skeleton: PreTrainedModel,
    generic: Dataset | None = None,
) -> None:
    """Refuse data of which nothing can be trained, or tokens that the model does not have.

    Args:
        generic: text that is mixed into the training set.

    Raises:
        UserError: fewer rows than one batch of all processes; a token beyond the embedding; samples longer than the
            model's table of positions.
    """
    if arguments.training.do_train:
        check_steps(arguments.training, data["train_dataset"])
    for sets in (data, {"train_dataset": generic, "eval_dataset": None}):
        check_fit(sets, tokenizer, skeleton, arguments.training.model_max_length)
