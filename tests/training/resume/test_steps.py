"""A training of zero steps is an error, in a trainer too; nothing is saved."""

from __future__ import annotations

import pytest
import torch
from helpers import make_llama, make_tokenizer, write_conversations
from transformers import TrainingArguments

from qat.errors import UserError
from utils import QATTrainer, make_supervised_data_module


def make_trainer(folder, train_dataset=None, **options) -> QATTrainer:
    data = make_supervised_data_module(str(write_conversations(folder / "c.jsonl", 12)), make_tokenizer(), eval_size=2)
    data |= {} if train_dataset is None else {"train_dataset": train_dataset}
    args = TrainingArguments(str(folder / "out"), report_to="none", use_cpu=True, disable_tqdm=True, **options)
    return QATTrainer(model=make_llama(layers=1), args=args, processing_class=make_tokenizer(), **data)


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 1}], ids=str)
def test_fewer_rows_than_one_batch_are_refused_before_training(tmp_path, length):
    too_large = {"per_device_train_batch_size": 11, "dataloader_drop_last": True}
    trainer = make_trainer(tmp_path, **too_large, **length)
    with pytest.raises(UserError, match="gives 10 rows, fewer than the --per_device_train_batch_size 11 x 1 process"):
        trainer.train()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 10}, {"dataloader_drop_last": False}], ids=str)
def test_one_batch_is_enough(tmp_path, options):
    trainer = make_trainer(
        tmp_path, **{"per_device_train_batch_size": 11, "dataloader_drop_last": True, "max_steps": 1, **options}
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_that_yields_nothing_is_an_error(tmp_path):
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    trainer = make_trainer(tmp_path, Nothing(), max_steps=2, accelerator_config={"dispatch_batches": False})
    with pytest.raises(UserError, match="nothing was trained: --dataset ended before the first batch"):
        trainer.train()
    assert not list(tmp_path.glob("out/**/model.safetensors"))
