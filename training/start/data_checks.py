"""Whether a model has embeddings and positions for the data that is to be trained or measured on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.sets.packing import PackedDataset
from qat.errors import UserError

from .skeleton import positions_of

logger = logging.getLogger(__name__)


def check_fit(data: dict, tokenizer: PreTrainedTokenizerBase, skeleton: PreTrainedModel, max_length: int) -> None:
    """Refuse tokens that the model does not have, and samples longer than its table of positions.

    Args:
        data: from `make_supervised_data_module`; a stream is not read.
        tokenizer: that made it.
        skeleton: the model, its parameters on the meta device or elsewhere.
        max_length: at which samples are cut.

    Raises:
        UserError: as described. A model whose positions are computed is warned of only.
    """
    sets = [samples for name in ("train_dataset", "eval_dataset") if (samples := _samples_of(data[name])) is not None]
    _check_tokens(sets, tokenizer, skeleton.get_input_embeddings().weight.shape[0])
    _check_lengths(sets, max_length, skeleton)


def local_paths(spec: str | None) -> Iterator[Path]:
    """The files and folders among the datasets of a list, which may have weights behind a colon."""
    for part in [spec] if spec and os.path.exists(spec) else (spec or "").split(","):
        for name in (part.strip(), part.strip().rpartition(":")[0]):
            if name and os.path.exists(name):
                yield Path(name)
                break


def _samples_of(dataset) -> Dataset | None:
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


def _check_lengths(sets: list[Dataset], max_length: int, skeleton: PreTrainedModel) -> None:
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
