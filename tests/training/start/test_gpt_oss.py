"""gpt-oss as it is published, its experts in MXFP4: trained in BF16 and with quantization, packed, started again."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from gpt_oss_folders import NATIVE, save_published, values_of
from helpers import write_conversations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import main
from qat.checkpoints import verify_logits
from qat.checkpoints.load import load_plain
from training.arguments.model import ModelArguments
from training.resume.written import check_saved_model
from training.start import start
from training.start.start import Start

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
    assert not [record for record in caplog.records if record.name.startswith("transformers.quantizers")]


def test_names_that_transformers_loses_are_refused_before_they_replace_a_model(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("qat.checkpoints.load.forget_format", lambda model: None)
    load_plain(workspace / "published").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"could not be loaded again: .*experts.* transformers loses weights"):
        check_saved_model(tmp_path)


def test_a_published_model_is_read_by_hub_id_and_without_weights_where_the_first_process_reads_them(
    workspace, tmp_path, monkeypatch
):
    repository = tmp_path / "models--org--oss"
    shutil.copytree(workspace / "published", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    read = Start.read(ModelArguments("org/oss"), str(tmp_path))
    assert read.is_native and not read.is_packed
    model = read.load_model()
    found, expected = model.state_dict(), values_of(workspace / "published")
    assert all(torch.equal(found[name].bfloat16(), tensor) for name, tensor in expected.items())
    monkeypatch.setattr(start, "waits_for_weights", lambda: True)
    empty = Start.read(ModelArguments(str(workspace / "published"))).load_model()
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes
    assert not hasattr(empty.config, "quantization_config")


def test_smoothing_of_published_experts_is_refused(workspace):
    with pytest.raises(ValueError, match="--smooth_alpha 0.5 would undo the rounding"):
        run(workspace, "smooth", *TRAIN, "--quant_scheme", "MXFP4A16", "--smooth_alpha", "0.5")


@pytest.fixture
def same_process(monkeypatch, tmp_path):
    """Start no process for logits: the same program, called."""

    def run_here(arguments, input_ids):
        save_file({"input_ids": input_ids}, tmp_path / "in.safetensors")
        files = ("--inputs", str(tmp_path / "in.safetensors"), "--outputs", str(tmp_path / "out.safetensors"))
        verify_logits.main([*arguments, *files])
        return load_file(tmp_path / "out.safetensors")

    monkeypatch.setattr(verify_logits, "_begin", lambda stack, *given: partial(run_here, *given))


def test_qat_of_published_experts_is_packed_in_the_native_format_and_proven(workspace, same_process, caplog):
    out = run(workspace, "qat", *TRAIN, "--quant_scheme", "MXFP4A16")
    assert "holds experts only, so its attention stays in BF16" in caplog.text
    packed, verdict = out / "MXFP4A16", json.loads((out / "MXFP4A16" / "verification.json").read_text())
    assert verdict["verified"] and verdict["logits"]["bit_equal"] and verdict["export_format"] == "mxfp4"
    assert verdict["weights"]["packed_weights"] == 4 and verdict["weights"]["elements_that_differ"] == 0
    stored, before = (load_file(folder / "model.safetensors") for folder in (packed, workspace / "published"))
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert json.loads((packed / "config.json").read_text())["quantization_config"] == NATIVE
    assert json.loads((out / "qat_config.json").read_text())["mapping"] == {"*.experts": "MXFP4A16"}
    loaded, values = AutoModelForCausalLM.from_pretrained(packed, dtype="auto").state_dict(), values_of(packed)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in values.items())
    # Both folders in the native format start a stage: ours in its scheme, the published one in BF16 or in a given one.
    losses = {
        name: json.loads((run(workspace, f"eval-{name}", "--do_eval", "True", *flags, model=model)
                          / "all_results.json").read_text())["eval_loss"]
        for name, model, flags in (
            ("trained", "qat", ()), ("packed", "qat/MXFP4A16", ()),
            ("published", "published", ()), ("rounded", "published", ("--quant_scheme", "MXFP4A16")),
        )
    }  # fmt: skip
    assert losses["trained"] == losses["packed"] and losses["published"] == losses["rounded"]
    again = run(workspace, "again", *TRAIN, "--export_format", "none", model="qat/MXFP4A16")
    assert json.loads((again / "qat_config.json").read_text())["mapping"] == {"*.experts": "MXFP4A16"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--quant_scheme", "MXFP8"),
            "--export_format auto: model.layers.0.mlp.experts.gate_up_proj has weights in mxfp8",
        ),
        (("--quant_mapping", "MAPPING"), "model.layers.0.self_attn.o_proj is quantized in MXFP4, and gpt-oss's native"),
        (("--quant_scheme", "MXFP4", "--export_format", "auto_round"), "AutoRound"),
        (("--quant_mapping", "MAPPING", "--export_format", "compressed-tensors", "--smooth_alpha", "0.1"), "undo"),
    ],
)
def test_what_the_native_format_cannot_hold_is_refused_before_training(workspace, tmp_path, flags, message):
    (tmp_path / "mapping.json").write_text(json.dumps({"*.experts": "MXFP4", "*.o_proj": "MXFP4"}))
    flags = [str(tmp_path / "mapping.json") if flag == "MAPPING" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(workspace, tmp_path.name, *TRAIN, *flags)
