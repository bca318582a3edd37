"""A QATTrainer on a few conversations, for tests of losses, teachers and reports."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import make_llama, make_tokenizer, write_conversations

from data.supervised import make_supervised_data_module
from training.arguments.training import TrainingArguments
from training.trainer import QATTrainer


def make_data(folder: Path, count: int = 12) -> dict:
    path = write_conversations(folder / "chats.jsonl", count)
    return make_supervised_data_module(str(path), make_tokenizer(), eval_size=3, data_cache_dir=str(folder / "data"))


def make_trainer(folder: Path, model, data, teacher, **kwargs) -> QATTrainer:
    own = ("distill_ce_weight", "distill_temperature", "log_quantization")
    options = {name: kwargs.pop(name) for name in own if name in kwargs}
    args = TrainingArguments(
        str(folder / "out"), report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 2, "per_device_train_batch_size": 3, "save_strategy": "no", "logging_steps": 1, **kwargs},
    )  # fmt: skip
    return QATTrainer(model=model, args=args, processing_class=make_tokenizer(), teacher=teacher, **options, **data)


def other_llama(**kwargs):
    """A model that differs from `make_llama`'s."""
    model = make_llama(**kwargs)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model
