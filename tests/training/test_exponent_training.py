"""Learned exponents from training to the packed file: nothing is lost, nothing unfinished is taken for a model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_llama, make_tokenizer, save_llama, write_conversations
from safetensors.torch import load_file
from torch import nn

import main
from qat import QATConfig, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.layers.finish import finished_config, finished_weights
from qat.layers.learned_exponents import SUFFIX
from qat.numerics import ops
from training.arguments.training import TrainingArguments
from utils import QATTrainer, make_supervised_data_module


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_baked_weights_are_those_of_the_forward_pass_and_survive_rounding_again(scheme):
    model = prepare_qat(make_llama(), {nn.Linear: scheme}, weight_scale_rule="search", learn_exponent=True)
    expected = {}
    for name, layer in model.named_modules():
        if (offset := getattr(getattr(layer, "weight_quantizer", None), "exponent_offset", None)) is not None:
            with torch.no_grad():
                offset.copy_(torch.randn(offset.shape) * 1.5)
                expected[f"{name}.weight"] = layer.weight_quantizer(layer.weight.bfloat16()).float()
    before = model.state_dict()
    after = finished_weights(model, before, {})
    assert set(after) == {name for name in before if not name.endswith(SUFFIX)}
    rule = finished_config(model.qat_config).scale_rules[scheme]["weight"]
    for name, tensor in after.items():
        assert torch.equal(tensor, expected.get(name, before[name])), name
        if name in expected:
            assert not torch.equal(tensor, before[name])
            again = ops.fake_quantize(tensor.bfloat16(), scheme.lower(), rule, torch.bfloat16)
            assert torch.equal(again.float(), tensor), name


def test_a_trainer_that_computes_in_another_dtype_than_what_is_baked_is_refused(tmp_path):
    path = write_conversations(tmp_path / "data.jsonl", 12)
    data = make_supervised_data_module(str(path), make_tokenizer(), eval_size=2)
    for learns in (False, True):
        model = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, learn_exponent=learns)
        args = TrainingArguments(str(tmp_path / "out"), report_to="none", bf16=False, max_steps=1, save_strategy="no")
        trainer = QATTrainer(model=model, args=args, processing_class=make_tokenizer(), **data)
        if learns:
            with pytest.raises(ValueError, match="--learn_exponent True: weights are saved .* in bfloat16"):
                trainer.train()
        else:
            assert trainer.train().global_step == 1


def run(folder, output: str, *flags: str, model: str = "model") -> dict:
    main.main(
        [
            "--model_name_or_path", str(folder / model), "--dataset", str(folder / "data.jsonl"), "--eval_size", "6",
            "--per_device_train_batch_size", "4", "--output_dir", str(folder / output), "--disable_tqdm", "True",
            "--report_to", "none", "--report", "False", "--logging_steps", "1", "--export_format", "none", *flags,
        ]
    )  # fmt: skip
    results = sorted((folder / output).rglob("all_results.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(results[-1].read_text())


def test_a_run_with_learned_exponents_resumes_exports_and_is_verified(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    flags = (
        "--do_train", "True", "--do_eval", "True", "--max_steps", "6", "--save_steps", "3", "--learning_rate", "1e-2",
        "--quant_scheme", "MXFP4", "--weight_scale_rule", "search", "--learn_exponent", "True",
        "--exponent_learning_rate", "0.4", "--weight_decay", "0.1",
    )  # fmt: skip
    whole = run(tmp_path, "whole", *flags)
    offsets = load_file(tmp_path / "whole/checkpoint-6/model.safetensors")
    moved = [t.round().abs().sum().item() for name, t in offsets.items() if name.endswith(SUFFIX)]
    assert len(moved) == 14 and sum(moved) > 0
    # Saved: plain names, packed and proven, evaluated as trained.
    assert set(load_file(tmp_path / "whole/model.safetensors")) == set(load_file(tmp_path / "model/model.safetensors"))
    export_checkpoint(tmp_path / "whole", tmp_path / "whole/MXFP4")
    verdict = verify(tmp_path / "whole/MXFP4", tmp_path / "whole", with_logits=False)
    assert verdict["verified"] and verdict["weights"]["elements_that_differ"] == 0
    assert QATConfig.load(tmp_path / "whole").scale_rules == {"MXFP4": {"weight": "rceil", "input": "floor"}}
    for folder in ("whole", "whole/MXFP4"):
        again = run(tmp_path, "again", "--do_eval", "True", model=folder)
        assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)

    # Resumed from the middle, the run ends where the uninterrupted one did.
    (tmp_path / "whole/checkpoint-3").rename(tmp_path / "checkpoint-3")
    run(tmp_path, "resumed", *flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    ends = [load_file(tmp_path / f / "model.safetensors") for f in ("whole", "resumed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ValueError, match="cannot resume.*learn_exponent True"):
        run(tmp_path, "whole", *flags, "--learn_exponent", "False", "--exponent_learning_rate", "1e-2")

    # What still needs its offsets is not taken for a model.
    for use in (
        lambda: run(tmp_path, "unfinished", "--do_eval", "True", model="checkpoint-3"),
        lambda: export_checkpoint(tmp_path / "checkpoint-3", tmp_path / "packed"),
    ):
        with pytest.raises(ValueError, match="checkpoint-3 is a checkpoint to resume from"):
            use()
