"""Training of adapters through QATTrainer's own interface: recomputed, compiled, packed, resumed, with a free teacher."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_tokenizer, write_conversations
from peft import LoraConfig
from safetensors.torch import load_file
from trainers import make_data, make_trainer
from transformers import PreTrainedModel

from data.supervised import make_supervised_data_module
from qat import prepare_qat
from qat.errors import UserError
from training.adapters.inject import add_adapters
from training.adapters.merging import factors_of

EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return make_data(tmp_path_factory.mktemp("data"))


def adapted(scheme: str | None = "MXFP4") -> PreTrainedModel:
    """A BF16 Llama with adapters, as a user makes it."""
    model = make_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    if scheme is not None:
        prepare_qat(model, {torch.nn.Linear: scheme})
    return add_adapters(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def trained(folder: Path, data: dict, teacher="self", **options) -> dict[str, torch.Tensor]:
    """The adapters after a few steps."""
    options = {"learning_rate": 1e-2, "max_steps": 3, "distill_ce_weight": 0.5 if teacher else 0.0, **options}
    trainer = make_trainer(folder, adapted(), data, teacher, **options)
    trainer.train()
    return factors_of(trainer.accelerator.unwrap_model(trainer.model))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(factor.any() for name, factor in found.items() if "_B" in name)
    assert all(torch.equal(factor, expected[name]) for name, factor in found.items())


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("plain"), data)


@pytest.mark.parametrize("arguments", [{}, {"use_reentrant": True}, {"use_reentrant": False, "every_n_layers": 2}])
def test_recomputed_activations_give_the_same_adapters(arguments, data, plain, tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": arguments or None}
    assert_same(trained(tmp_path, data, **options), plain)


def test_the_free_teacher_is_a_copy_of_the_model_before_adapters(data, plain, tmp_path):
    copy = make_llama()
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    assert_same(trained(tmp_path, data, copy), plain)
