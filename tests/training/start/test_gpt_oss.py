"""gpt-oss as it is published, its experts in MXFP4: trained in BF16 and with quantization, packed, started again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpt_oss_folders import save_published, values_of
from helpers import write_conversations
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import main
from qat.checkpoints.load import load_plain
from training.resume.written import check_saved_model

TRAIN = ("--do_train", "True", "--max_steps", "2", "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    save_published(folder / "published")
    write_conversations(folder / "data.jsonl")
    return folder


def run(workspace: Path, output: str, *flags: str, model: str = "published") -> Path:
    """Run main.py; returns its output folder."""
    main.main(
        ["--model_name_or_path", str(workspace / model), "--dataset", str(workspace / "data.jsonl"), "--eval_size", "4",
         "--output_dir", str(workspace / output), "--report_to", "none", "--report", "False", "--disable_tqdm", "True",
         "--per_device_train_batch_size", "4", "--model_max_length", "64", "--save_strategy", "no", *flags]
    )  # fmt: skip
    return workspace / output


def test_the_bf16_stage_saves_a_plain_model_that_loads_again_with_the_experts_that_were_trained(workspace, caplog):
    out = run(workspace, "bf16", *TRAIN)
    saved, before = load_file(out / "model.safetensors"), values_of(workspace / "published")
    assert set(saved) == set(before) and "quantization_config" not in json.loads((out / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(loaded[name], tensor), name
        if name.endswith("_proj") and "experts" in name:
            moved = (tensor.float() - before[name].float()).abs().max()
            assert 0 < moved < 0.1, name
    assert "MXFP4" not in caplog.text  # of transformers, about kernels


def test_names_that_transformers_loses_are_refused_before_they_replace_a_model(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("qat.checkpoints.load.forget_format", lambda model: None)
    load_plain(workspace / "published").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"could not be loaded again: .*experts.* transformers loses weights"):
        check_saved_model(tmp_path)


def test_smoothing_of_published_experts_is_refused(workspace):
    with pytest.raises(ValueError, match="--smooth_alpha 0.5 would undo the rounding"):
        run(workspace, "smooth", *TRAIN, "--quant_scheme", "MXFP4A16", "--smooth_alpha", "0.5")
