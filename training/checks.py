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

import pyarrow.compute
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.sets.packing import PackedDataset
from qat import QATConfig
from qat.checkpoints.exportable import check_exportable
from qat.errors import UserError
from qat.files.paths import check_apart, check_model_path, make_writable
from qat.files.trust import check_model_folder

from .arguments.parse import Arguments
from .arguments.training import TrainingArguments
from .resume.output import OutputFolder
from .resume.steps import check_steps
from .start.loading import without_weights
from .start.start import Start
from .teachers.choose import check_cached_size
from .teachers.load import check_teacher

logger = logging.getLogger(__name__)


# ---- Paths ----


def check_paths(arguments: Arguments) -> None:
    """Refuse models that are not there, places that cannot be written, and to write where something is read.

    Raises:
        UserError: as described. An evaluation may write into the folder of its model: it makes a new folder there.
    """
    model_args, args, data_args, _, distill_args = arguments
    check_model_path("--model_name_or_path", model_args.model_name_or_path, model_args.gguf_file is None)
    teacher = distill_args.teacher_model_name_or_path
    if teacher is not None:
        check_model_path("--teacher_model_name_or_path", teacher)
    inputs = {f"--dataset {path}": path for path in _local_paths(data_args.dataset)}
    inputs |= {f"--eval_dataset {path}": path for path in _local_paths(data_args.eval_dataset)}
    if args.do_train:
        inputs["--model_name_or_path"] = model_args.model_name_or_path
        inputs |= {} if teacher is None else {"--teacher_model_name_or_path": teacher}
    check_apart("--output_dir", args.output_dir, inputs)
    for name, folder in (
        ("--data_cache_dir", data_args.data_cache_dir), ("--distill_cache_dir", distill_args.distill_cache_dir)
    ):  # fmt: skip
        if folder is not None:
            make_writable(name, folder)


def _local_paths(spec: str | None) -> Iterator[Path]:
    """The files and folders among the datasets of a list, which may have weights behind a colon."""
    for part in [spec] if spec and Path(spec).exists() else (spec or "").split(","):
        for name in (part.strip(), part.strip().rpartition(":")[0]):
            if name and Path(name).exists():
                yield Path(name)
                break


# ---- The model, without its weights ----


def check_model(arguments: Arguments, start: Start, output: OutputFolder) -> PreTrainedModel:
    """The model without weights, prepared as it is going to be trained: what cannot be done with it is refused.

    Returns:
        The model, its parameters on the meta device.

    Raises:
        UserError: its configuration cannot be read, or is not of a causal language model; --model_max_length is more
            than its positions; the teacher does not fit; the scheme, the mapping or the export format does not; the
            packed model's folder is occupied; or the checkpoint to resume from is not there or of another training.
    """
    args, quant_args, distill_args = arguments.training, arguments.quantization, arguments.distillation
    skeleton = _skeleton(start)
    _check_length(args, skeleton.config)
    if distill_args.distill:
        check_cached_size(skeleton.config, distill_args)
        if distill_args.teacher_model_name_or_path is not None:
            _check_teacher(start, skeleton, distill_args.teacher_model_name_or_path)
    with _silenced():  # the model itself is prepared aloud
        start.quantize(skeleton, quant_args)
    config = cast("QATConfig | None", getattr(skeleton, "qat_config", None))
    if args.do_train and config is not None and quant_args.export_format != "none":
        _check_export(skeleton, config, quant_args.quant_mapping, quant_args.export_format, output)
    if args.do_train and not (start.is_packed and config is None):  # which is known once it is unpacked
        output.check_resumable(args, config)
    return skeleton


def _skeleton(start: Start) -> PreTrainedModel:
    try:
        return without_weights(start.model_args, start.cache_dir)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable("--model_name_or_path", start.model_args.model_name_or_path, error) from error


def _unreadable(argument: str, name: str, error: Exception) -> UserError:
    """transformers' first line is the reason; others explain its own interface."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{argument} {name!r} is no causal language model that can be loaded: {reason[:300].rstrip('.: ')}. Give a "
        "local folder, or the hub id of one that is in the cache or can be downloaded"
    )


def _check_length(args: TrainingArguments, config: PretrainedConfig) -> None:
    limit = positions_of(config)
    if limit is not None and args.model_max_length > limit and args.model_max_length != type(args).model_max_length:
        raise UserError(
            f"--model_max_length {args.model_max_length} is more than the {limit} positions of the model; give at most "
            f"{limit}, or raise max_position_embeddings in its config.json if it can take more"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """The tokens that a model has positions for, scaled ones included; None where its configuration does not say."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", limit)
    return max(limit, int(original * factor)) if factor else limit


def _check_teacher(start: Start, skeleton: PreTrainedModel, name: str) -> None:
    check_model_folder(name)
    model_args = start.model_args
    options = {"cache_dir": start.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    try:
        teacher = SimpleNamespace(config=AutoConfig.from_pretrained(name, **options))
        tokenizers = [AutoTokenizer.from_pretrained(n, **options) for n in (model_args.model_name_or_path, name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable("--teacher_model_name_or_path", name, error) from error
    check_teacher(skeleton, teacher, *tokenizers)


def _check_export(
    skeleton: nn.Module, config: QATConfig, mapping: str | None, export_format: str, output: OutputFolder
) -> None:
    try:
        check_exportable(skeleton, export_format)
    except UserError as error:
        raise UserError(f"--quant_mapping {mapping!r}: {error}" if mapping else str(error)) from error
    output.check_packable(config)


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


def check_data(arguments: Arguments, data: dict, tokenizer: PreTrainedTokenizerBase, skeleton: PreTrainedModel) -> None:
    """Refuse data of which nothing can be trained, or tokens that the model does not have.

    Raises:
        UserError: fewer rows than one batch of all processes; a token beyond the embedding; samples longer than the
            model's table of positions.
    """
    if arguments.training.do_train:
        check_steps(arguments.training, data["train_dataset"])
    sets = [_samples(data[name]) for name in ("train_dataset", "eval_dataset")]
    known = [samples for samples in sets if samples is not None]
    _check_tokens(known, tokenizer, skeleton.get_input_embeddings().weight.shape[0])
    _check_sample_lengths(known, arguments.training.model_max_length, skeleton)


def _samples(dataset) -> Dataset | None:
    """The tokenized samples of a set, packed or not; None for a stream, which is not read before it trains."""
    samples = dataset.samples if isinstance(dataset, PackedDataset) else dataset
    return samples if isinstance(samples, Dataset) else None


def _check_tokens(sets: list[Dataset], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < rows:
        return  # no token can lie beyond the embedding: the usual case, in which no data is read
    remedy = (
        f"and the model's embedding has {rows} rows; resize it once with model.resize_token_embeddings(len(tokenizer)) "
        "and save both, or give the tokenizer that belongs to the model"
    )
    for name in ("pad", "eos", "bos"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number >= rows:
            raise UserError(
                f"--model_name_or_path: the tokenizer's {name} token {getattr(tokenizer, f'{name}_token')!r} has the "
                f"id {number}, {remedy}"
            )
    for samples in sets:
        largest = _largest(samples, "input_ids")
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(f"--dataset has the token {token!r} with the id {largest}, {remedy}")


def _largest(samples: Dataset, column: str) -> int:
    chunks = samples.data.column(column).chunks
    values = (chunk.flatten() if hasattr(chunk, "flatten") and column == "input_ids" else chunk for chunk in chunks)
    return max((pyarrow.compute.max(chunk).as_py() or 0 for chunk in values), default=0)


def _check_sample_lengths(sets: list[Dataset], max_length: int, skeleton: PreTrainedModel) -> None:
    limit = positions_of(skeleton.config)
    if limit is None or max_length <= limit:
        return
    longest = max((_largest(samples, "length") for samples in sets), default=0)
    if longest <= limit:
        return
    tables = [n for n, module in skeleton.named_modules() if isinstance(module, nn.Embedding) and _is_of_positions(n)]
    message = (
        f"the longest sample has {longest} tokens, and the model has {limit} positions; give --model_max_length {limit}"
    )
    if tables:
        raise UserError(f"--model_max_length {max_length}: {message}")
    logger.warning("%s", message)


def _is_of_positions(name: str) -> bool:
    return "position" in name or name.rpartition(".")[2] in ("wpe", "embed_pos")
