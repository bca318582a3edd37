"""make_supervised_data_module: tokenized training and evaluation sets, and the collator that batches them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from .formatting import IGNORE_INDEX, encode_conversation
from .readers import read_splits

logger = logging.getLogger(__name__)


def make_supervised_data_module(
    dataset: str = "Daring-Anteater",
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_size: int = 0,
    eval_size: int = 0,
) -> dict:
    """What a Trainer needs for supervised fine-tuning: `train_dataset`, `eval_dataset` and `data_collator`.

    Args:
        dataset: "Daring-Anteater", "cnn_dailymail", "python-docs", or a local file or folder of one of their schemas.
        tokenizer: a fast tokenizer; samples are cut at its `model_max_length`.
        train_size, eval_size: numbers of samples, 0 for the dataset's default.

    Raises:
        ValueError: see `data.readers.read_splits` and `data.formatting.encode_conversation`.
    """
    if tokenizer is None:
        raise ValueError("tokenizer=None: make_supervised_data_module needs the model's tokenizer")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of the model")
    train, held_out = read_splits(dataset, train_size, eval_size)
    return {
        "train_dataset": _encode(train, tokenizer, f"{dataset} training samples"),
        "eval_dataset": _encode(held_out, tokenizer, f"{dataset} evaluation samples"),
        "data_collator": SupervisedCollator(pad_token_id=_pad_token_id(tokenizer)),
    }


def _encode(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, description: str) -> datasets.Dataset:
    encoded = split.map(
        encode_conversation,
        fn_kwargs={"tokenizer": tokenizer, "max_length": tokenizer.model_max_length},
        remove_columns=split.column_names,
        desc=f"Tokenizing {description}",
    )
    labelled = encoded.filter(_has_labels, desc=f"Checking {description}")
    if dropped := len(encoded) - len(labelled):
        logger.warning(
            "%d of %d %s have no answer within model_max_length=%d tokens and are left out",
            dropped, len(encoded), description, tokenizer.model_max_length,
        )  # fmt: skip
    if not len(labelled):
        raise ValueError(
            f"none of the {len(encoded)} {description} has an answer within --model_max_length "
            f"{tokenizer.model_max_length} tokens; raise it, or check the data"
        )
    return labelled


def _has_labels(sample: dict) -> bool:
    # The first token is never predicted, so a label there does not count.
    return any(label != IGNORE_INDEX for label in sample["labels"][1:])


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else pad


@dataclass
class SupervisedCollator:
    """Pads a batch to its longest sample, on the right; padding has attention 0 and no label, whatever its token is."""

    pad_token_id: int

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Samples with `input_ids` and `labels` -> int64 tensors [batch, longest]: those two and `attention_mask`."""
        longest = max(len(sample["input_ids"]) for sample in samples)

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        input_ids = [list(sample["input_ids"]) for sample in samples]
        return {
            "input_ids": pad(input_ids, self.pad_token_id),
            "labels": pad([list(sample["labels"]) for sample in samples], IGNORE_INDEX),
            "attention_mask": pad([[1] * len(row) for row in input_ids], 0),
        }
