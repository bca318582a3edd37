"""main.py with adapters: what it writes, what peft makes of that, and that a killed run loses nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_llama, write_conversations
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import logits_in_this_process
from transformers import AutoModelForCausalLM, AutoTokenizer

import main
from qat.errors import UserError
from qat.numerics import low_rank
from training.start import weights as changes_of_weights
from utils import QATTrainer

CHANGES = {
    "default": (),
    "olora": ("--lora_init", "olora"),
    "smoothing": ("--smooth_alpha", "0.7"),
    "both": ("--lora_init", "pissa", "--smooth_alpha", "0.7"),
    "gptq": ("--weight_init", "gptq"),
}
TRAIN = ("--do_train", "True", "--max_steps", "4", "--save_steps", "2", "--lora_r", "4")
DISTILLED = (*TRAIN, "--quant_scheme", "MXFP4", "--distill", "True")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_llama(folder / "model")
    write_conversations(folder / "data.jsonl")
    return folder


def run(workspace: Path, output: str, *flags: str, model: str = "model") -> Path:
    """Run main.py; returns the folder that it wrote to."""
    main.main(
        [
            "--model_name_or_path", str(workspace / model), "--dataset", str(workspace / "data.jsonl"),
            "--eval_size", "6", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--report", "False",
            "--output_dir", str(workspace / output), "--disable_tqdm", "True", "--report_to", "none",
            "--logging_steps", "1", "--export_format", "none", *flags,
        ]
    )  # fmt: skip
    return workspace / output


def loss_of(folder: Path) -> float:
    return json.loads((folder / "all_results.json").read_text())["eval_loss"]


def weights(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / file)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


same_process = pytest.fixture(logits_in_this_process)


@pytest.fixture(scope="module")
def finished(workspace) -> dict[str, Path]:
    return {name: run(workspace, name, *DISTILLED, *flags) for name, flags in CHANGES.items()}


def never(*_args, **_kwargs):
    raise AssertionError("what is in the folder is made again")


class _PowerCut(BaseException):
    pass


@pytest.mark.parametrize("name", ["default", "both", "gptq"])
def test_a_killed_run_resumes_bit_for_bit_without_changing_weights_again(workspace, finished, monkeypatch, name):
    step = QATTrainer.training_step

    def cut_the_power(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise _PowerCut
        return step(self, *args, **kwargs)

    flags = (*DISTILLED, *CHANGES[name])
    with monkeypatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(QATTrainer, "training_step", cut_the_power)
        run(workspace, f"cut-{name}", *flags)
    for change in ("smooth_with_data", "compensate_with_data"):
        monkeypatch.setattr(changes_of_weights, change, never)
    monkeypatch.setattr(torch.linalg, "svd", never)
    cut = run(workspace, f"cut-{name}", *flags)
    assert equal(weights(cut), weights(finished[name]))
    adapters = "adapter_model.safetensors"
    assert equal(weights(cut / "adapter", adapters), weights(finished[name] / "adapter", adapters))
    logs = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (cut, finished[name])]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("name", CHANGES)
def test_peft_adds_the_adapter_to_the_model_that_it_names_and_has_the_saved_model(finished, name):
    config = config_of(finished[name] / "adapter")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype="auto")
    adapted = PeftModel.from_pretrained(base, finished[name] / "adapter")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        unmerged = adapted.float()(ids).logits
        saved = AutoModelForCausalLM.from_pretrained(finished[name], dtype=torch.float32)
        assert torch.allclose(unmerged, saved(ids).logits, atol=0.02 * float(unmerged.abs().max()))
        assert not torch.allclose(unmerged, base_logits(config, ids), atol=0.04 * float(unmerged.abs().max()))
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype="auto")
    merged = PeftModel.from_pretrained(base, finished[name] / "adapter").merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in weights(finished[name]).items())


def base_logits(config: dict, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)(ids).logits


def test_a_base_is_written_where_frozen_weights_change_and_only_there(workspace, finished):
    original = weights(workspace / "model")
    assert not (finished["default"] / "base").exists()
    assert config_of(finished["default"] / "adapter")["base_model_name_or_path"] == str(workspace / "model")
    for name in ("olora", "smoothing", "both", "gptq"):
        base = weights(finished[name] / "base")
        assert base.keys() == original.keys() and not equal(base, original)
        assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
        assert config_of(finished[name] / "adapter")["base_model_name_or_path"] == str(finished[name] / "base")
        assert (finished[name] / "base" / "start").is_dir() == (name in ("olora", "both"))
        assert AutoTokenizer.from_pretrained(finished[name] / "base")("a")["input_ids"]
        assert not (finished[name] / "base" / "qat_config.json").exists()


def test_smoothed_frozen_weights_are_those_of_a_run_without_adapters(workspace, finished):
    full = ("--do_train", "True", "--max_steps", "1", "--learning_rate", "1e-30", "--quant_scheme", "MXFP4")
    whole = run(workspace, "whole", *full, "--smooth_alpha", "0.7")
    assert equal(weights(finished["smoothing"] / "base"), weights(whole))


def test_the_model_itself_teaches_as_a_copy_of_its_start_does(workspace, finished):
    """A start that smoothing and a decomposition have changed; test_adapter_training.py has one that nothing has."""
    teacher = Path(shutil.copytree(finished["both"] / "base", workspace / "teacher"))
    merge_into(teacher, teacher / "start")
    copied = run(workspace, "copied", *DISTILLED, *CHANGES["both"], "--teacher_model_name_or_path", str(teacher))
    assert equal(weights(copied), weights(finished["both"]))


def merge_into(folder: Path, adapter: Path) -> None:
    """Add an adapter to the weights in a folder, by the plain functions."""
    factors, merged = weights(adapter, "adapter_model.safetensors"), weights(folder)
    config = LoraConfig.from_pretrained(adapter)
    for name in [name for name in factors if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        alpha = config.alpha_pattern.get(layer.rpartition(".")[2], config.lora_alpha)
        scaling = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
        merged[f"{layer}.weight"] = low_rank.merge(merged[f"{layer}.weight"], a, b, scaling)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


def test_resuming_needs_the_base_and_the_same_way_to_make_it(workspace, finished):
    cut = Path(shutil.copytree(finished["both"], workspace / "without-base"))
    with pytest.raises(UserError, match="--lora_init pissa, and this run has default"):
        run(workspace, "without-base", *DISTILLED, *CHANGES["smoothing"])
    with pytest.raises(UserError, match="--smooth_alpha 0.7, and this run has 0.0"):
        run(workspace, "without-base", *DISTILLED)
    shutil.rmtree(cut / "base")
    with pytest.raises(UserError, match="cannot resume: .*base is missing"):
        run(workspace, "without-base", *DISTILLED, *CHANGES["both"])


def test_another_folder_resumes_a_checkpoint_and_gets_the_base_too(workspace, finished):
    checkpoint = finished["both"] / "checkpoint-2"
    moved = run(workspace, "moved", *DISTILLED, *CHANGES["both"], "--resume_from_checkpoint", str(checkpoint))
    assert equal(weights(moved), weights(finished["both"]))
    assert equal(weights(moved / "base"), weights(finished["both"] / "base"))
    assert config_of(moved / "adapter")["base_model_name_or_path"] == str(moved / "base")


def test_the_packed_model_is_proven_with_no_element_that_differs(workspace, same_process):
    flags = (
        "--quant_scheme",
        "MXFP4",
        "--lora_init",
        "pissa",
        "--export_format",
        "auto",
        "--max_steps",
        "2",
        "--do_eval",
        "True",
    )
    folder = run(workspace, "packed", *TRAIN, *flags)
    proof = json.loads((folder / "MXFP4" / "verification.json").read_text())
    assert proof["verified"] and proof["weights"]["elements_that_differ"] == 0 and proof["logits"]["bit_equal"]
    assert "LoRA of rank 4, alpha 32, merged: down_proj, gate_proj" in (folder / "MXFP4" / "README.md").read_text()
    served = run(workspace, "served", "--do_eval", "True", "--master_dtype", "bfloat16", model="packed/MXFP4")
    assert loss_of(served) == loss_of(folder)


def test_a_stage_without_quantization_trains_adapters_and_evaluates_what_it_saves(workspace):
    folder = run(workspace, "bf16", *TRAIN, "--do_eval", "True")
    again = run(workspace, "bf16-again", "--do_eval", "True", "--adapter_name_or_path", str(folder / "adapter"))
    assert loss_of(again) == loss_of(folder)
    plain = run(workspace, "bf16-plain", "--do_eval", "True")
    assert loss_of(folder) < loss_of(plain) - 0.1
    saved = run(workspace, "bf16-saved", "--do_eval", "True", "--master_dtype", "bfloat16", model="bf16")
    assert loss_of(saved) == loss_of(folder)


def test_a_full_run_in_the_folder_leaves_no_adapter_of_another_model_behind(workspace, finished):
    folder = Path(shutil.copytree(finished["default"], workspace / "reused"))
    run(workspace, "reused", "--do_train", "True", "--max_steps", "1", "--resume_from_checkpoint", "False")
    assert (folder / "model.safetensors").is_file() and not any((folder / "adapter").iterdir())


# ---- Adapters of others ----


@pytest.fixture(scope="module")
def published(workspace) -> Path:
    """An adapter that peft made, with a rank and a scaling of its own for some layers."""
    torch.manual_seed(1)
    save_llama(workspace / "fp32", torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True, lora_dropout=0.1,
        rank_pattern={"down_proj": 6}, alpha_pattern={"q_proj": 16}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(workspace / "fp32"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(workspace / "published")
    return workspace / "published"


def test_an_adapter_of_peft_evaluates_to_what_peft_computes(workspace, published, caplog):
    fp32 = ("--do_eval", "True", "--bf16", "False")
    ours = run(workspace, "evaluated", *fp32, "--adapter_name_or_path", str(published), model="fp32")
    base = AutoModelForCausalLM.from_pretrained(workspace / "fp32")
    PeftModel.from_pretrained(base, published).merge_and_unload().save_pretrained(workspace / "merged")
    AutoTokenizer.from_pretrained(workspace / "fp32").save_pretrained(workspace / "merged")
    merged = run(workspace, "of-merged", *fp32, model="merged")
    plain = run(workspace, "of-plain", *fp32, model="fp32")
    assert loss_of(ours) == pytest.approx(loss_of(merged), rel=1e-6)
    assert abs(loss_of(plain) - loss_of(merged)) > 1e-3


def test_training_starts_from_an_adapter_and_the_teacher_is_the_model_with_it(workspace, published):
    teacher = Path(shutil.copytree(workspace / "model", workspace / "with-published"))
    merge_into(teacher, published)
    flags = ("--do_train", "True", "--max_steps", "2", "--quant_scheme", "MXFP4", "--distill", "True")
    flags = (*flags, "--adapter_name_or_path", str(published))
    first = run(workspace, "from-published", *flags)
    copied = run(workspace, "from-copied", *flags, "--teacher_model_name_or_path", str(teacher))
    assert equal(weights(first), weights(copied)) and not equal(weights(first), weights(teacher))
    config, before = config_of(first / "adapter"), config_of(published)
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    assert all(config[name] == before[name] for name in kept[:-1])
    assert sorted(config["target_modules"]) == sorted(before["target_modules"])
    assert config["lora_dropout"] == 0 and config["base_model_name_or_path"] == str(workspace / "model")
