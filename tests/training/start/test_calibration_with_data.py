"""Calibration by training samples: which samples, what is kept, and what a resumed run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import make_llama, save_llama, write_conversations
from safetensors.torch import load_file

import main
from data.sets.collating import SupervisedCollator
from qat import QATConfig, prepare_qat
from qat.errors import UserError
from training.arguments.quantization import QuantizationArguments
from training.start import samples
from training.start.calibration import calibrate_with_data, check_calibration

CPU = torch.device("cpu")


def make_data() -> dict:
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    return {"train_dataset": [{"input_ids": r, "labels": r} for r in ids], "data_collator": SupervisedCollator(0)}


def largest_inputs(model: torch.nn.Module, rows: list[list[int]]) -> dict[str, float]:
    """The largest magnitude that each linear layer of an unquantized model reads."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: max(found.get(name, 0), float(args[0].abs().max()))})
            )
    with torch.no_grad():
        for row in rows:
            model.eval()(torch.tensor([row]))
    return found


def test_scales_are_those_of_the_beginnings_of_the_first_samples_and_fused_layers_share_them(monkeypatch):
    monkeypatch.setattr(samples, "TOKENS", 8)
    data, model = make_data(), make_llama(layers=1)
    rows = [row["input_ids"][:8] for row in data["train_dataset"][:2]]
    expected = largest_inputs(make_llama(layers=1), rows)
    calibrate_with_data(prepare_qat(model, {torch.nn.Linear: "NVFP4"}), data, 2, CPU)
    scales = model.qat_config.calibrated_scales
    assert len(scales) == 7
    for name, scale in scales.items():
        assert scale == pytest.approx(448 * 6 / expected[name.removesuffix(".input_global_scale")], rel=1e-6), name
    attention = "model.layers.0.self_attn"
    assert len({scales[f"{attention}.{n}.input_global_scale"] for n in ("q_proj", "k_proj", "v_proj")}) == 1


def test_settings_of_a_calibration_that_does_not_take_place_are_refused():
    weight_only = prepare_qat(make_llama(layers=1), {torch.nn.Linear: "NVFP4A16"})
    model = prepare_qat(make_llama(layers=1), {torch.nn.Linear: "NVFP4"})
    both = QuantizationArguments(calibration_samples=5, input_scale_refresh=5)
    with pytest.raises(UserError, match="--input_scale_refresh 5 has no effect"):
        check_calibration(weight_only, QuantizationArguments(input_scale_refresh=5))
    with pytest.raises(UserError, match="--calibration_samples 5 has no effect: no layer of the model"):
        check_calibration(weight_only, QuantizationArguments(calibration_samples=5))
    check_calibration(model, both)
    calibrate_with_data(model, make_data(), 2, CPU)
    with pytest.raises(UserError, match="--calibration_samples 5 has no effect: .* calibrated already"):
        check_calibration(model, QuantizationArguments(calibration_samples=5))
    check_calibration(model, both)


def test_the_log_has_the_number_of_samples_that_there_are(caplog, capsys):
    model = prepare_qat(make_llama(layers=1), {torch.nn.Linear: "NVFP4"})
    with caplog.at_level("INFO"):
        calibrate_with_data(model, make_data(), 1000, CPU)
    assert "Calibrated 7 scales on 3 samples" in caplog.text and "3/3" in capsys.readouterr().err


def run(folder: Path, output: str, *flags: str) -> None:
    main.main(
        [
            "--model_name_or_path", str(folder / "model"), "--dataset", str(folder / "data.jsonl"), "--eval_size", "6",
            "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--output_dir", str(folder / output),
            "--disable_tqdm", "True", "--report_to", "none", "--report", "False", "--export_format", "none",
            "--do_train", "True", "--max_steps", "4", "--quant_scheme", "NVFP4",
            "--input_scale_refresh", "3", "--save_steps", "2", *flags,
        ]
    )  # fmt: skip


def test_the_best_checkpoint_brings_its_scales(tmp_path):
    save_llama(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    best = ("--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "2", "--do_eval", "True")
    worse = ("--learning_rate", "1.0", "--lr_scheduler_type", "constant")
    run(tmp_path, "best", *best, "--metric_for_best_model", "loss", *worse)
    saved, first, last = (
        QATConfig.load(tmp_path / "best" / name).calibrated_scales for name in (".", "checkpoint-2", "checkpoint-4")
    )
    assert saved == first != last


def test_a_resumed_run_has_the_scales_of_its_checkpoint_and_ends_as_if_it_had_never_stopped(tmp_path):
    save_llama(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    run(tmp_path, "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run(tmp_path, "resumed", "--resume_from_checkpoint", str(checkpoint))
    whole, resumed = (QATConfig.load(tmp_path / name) for name in ("whole", "resumed"))
    first = json.loads((checkpoint / "qat_config.json").read_text())["calibrated_scales"]
    assert whole == resumed and first != whole.calibrated_scales  # refreshed in step 3
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
