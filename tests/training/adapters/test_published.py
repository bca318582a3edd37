"""Adapters of others: where they are found, what of their configuration counts, and values that are refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.files.model_folder import ADAPTER_WEIGHTS_NAME
from training.adapters.files import read_factors
from training.adapters.inject import add_adapters
from training.adapters.published import find_adapter, read_config


@pytest.fixture
def adapter(tmp_path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    get_peft_model(make_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_of_the_hub_is_read_from_the_cache(adapter, tmp_path):
    repository = tmp_path / "cache" / "models--org--adapter"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(adapter, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find_adapter("org/adapter", str(tmp_path / "cache")) == snapshot
    (snapshot / ADAPTER_WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=f"'org/adapter' is neither a folder nor .*{ADAPTER_WEIGHTS_NAME}"):
        find_adapter("org/adapter", str(tmp_path / "cache"))


def test_dropout_of_its_training_is_left_out_and_logged(adapter, caplog):
    with caplog.at_level(logging.INFO):
        config = read_config(adapter)
    assert config.lora_dropout == 0 and "was trained with dropout 0.1" in caplog.text


def test_another_base_than_it_names_is_logged(adapter, tmp_path, caplog):
    change(adapter, base_model_name_or_path="org/base")
    read_config(adapter, "org/base")
    assert "names the base" not in caplog.text
    read_config(adapter, str(tmp_path))
    assert "names the base 'org/base'" in caplog.text


def test_settings_of_initialisation_have_no_part_in_what_is_computed(adapter):
    change(adapter, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert read_config(adapter).init_lora_weights is True


def test_a_link_out_of_its_folder_is_refused(adapter, tmp_path):
    (adapter / ADAPTER_WEIGHTS_NAME).rename(tmp_path / "elsewhere.safetensors")
    (adapter / ADAPTER_WEIGHTS_NAME).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is a link out of its folder"):
        find_adapter(str(adapter))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda t: t.fill_(float("nan")), "has NaN or infinite values"),
        (lambda t: t.to(torch.int32), "is stored as I32; one of F32, BF16, F16 is read"),
        (lambda t: t[:, :32].contiguous(), r"has shape \(4, 32\), the model's adapter \(4, 64\)"),
    ],
)
def test_damaged_values_are_refused_by_name(adapter, damage, message):
    tensors = load_file(adapter / ADAPTER_WEIGHTS_NAME)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: damage(tensors[name])}, adapter / ADAPTER_WEIGHTS_NAME)
    model = add_adapters(make_llama(), read_config(adapter))
    with pytest.raises(UserError, match=f"q_proj.*{message}"):
        read_factors(adapter, model)


def test_a_cut_file_is_refused(adapter):
    path = adapter / ADAPTER_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{ADAPTER_WEIGHTS_NAME} is damaged"):
        read_factors(adapter, add_adapters(make_llama(), read_config(adapter)))
