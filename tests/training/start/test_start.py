"""What a stage may start from: a quantized model is not its own teacher, and no setting is without effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_llama, save_llama, save_qat, write_conversations

import main
from qat import QATConfig, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from training.arguments.distillation import DistillationArguments
from training.arguments.model import ModelArguments
from training.arguments.quantization import QuantizationArguments
from training.start.calibration import scales_of_checkpoint
from training.start.start import Start


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """plain; trained for MXFP4; baked, by learned exponents; packed by us; foreign, packed by others."""
    folder = tmp_path_factory.mktemp("start")
    save_llama(folder / "plain")
    for name, learns in (("trained", False), ("baked", True)):
        shutil.copytree(folder / "plain", folder / name)
        prepare_qat(make_llama(), {torch.nn.Linear: "MXFP4"}, learn_exponent=learns).qat_config.save(folder / name)
    export_checkpoint(folder / "trained", folder / "packed")
    shutil.copytree(folder / "packed", folder / "foreign")
    (folder / "foreign" / "qat_config.json").unlink()
    write_conversations(folder / "data.jsonl", 12)
    return folder


def check(folder: Path, quantization: dict | None = None, **distillation) -> None:
    Start.read(ModelArguments(str(folder))).check(
        QuantizationArguments(**quantization or {}), DistillationArguments(**distillation), trains=True
    )


@pytest.mark.parametrize("teacher", ["copy", "cache"])
@pytest.mark.parametrize("start", ["trained", "baked", "packed", "foreign"])
def test_a_model_that_is_quantized_or_trained_for_it_is_no_teacher(folders, start, teacher):
    for quantization in ({}, {"quant_scheme": "MXFP4"}):
        with pytest.raises(ValueError, match=f"a copy of --model_name_or_path .*{start}.*--teacher_model_name_or_path"):
            check(folders / start, quantization, distill=True, distill_teacher=teacher)
        check(folders / start, quantization, teacher_model_name_or_path=str(folders / "plain"), distill_teacher=teacher)
    check(folders / "plain", {"quant_scheme": "MXFP4"}, distill=True, distill_teacher=teacher)


@pytest.mark.parametrize("start", ["baked", "packed", "foreign"])
def test_quantized_values_are_not_their_own_unquantized_teacher(folders, start):
    with pytest.raises(ValueError, match=f"--distill_teacher self: .*{start}.* are quantized values.*--teacher_model_"):
        check(folders / start, distill_teacher="self")
    for sound in ("plain", "trained"):
        check(folders / sound, {"quant_scheme": "MXFP4"}, distill_teacher="self")


@pytest.mark.parametrize("start", ["packed", "foreign"])
def test_smoothing_does_not_undo_the_rounding_of_a_packed_model(folders, start):
    with pytest.raises(ValueError, match=f"--smooth_alpha 0.7 would undo .*{start}.*--smooth_alpha 0, or start from"):
        check(folders / start, {"smooth_alpha": 0.7, "quant_scheme": "MXFP4"})
    check(folders / "trained", {"smooth_alpha": 0.7})


@pytest.mark.parametrize(
    "setting",
    [
        {"smooth_alpha": 0.7},
        {"learn_exponent": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_quantization_need_something_to_quantize(folders, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"--{name} {value} needs a model to quantize: give --quant_scheme"):
        check(folders / "plain", setting)
    check(folders / "plain", setting | {"quant_scheme": "MXFP4"})
    check(folders / "trained", setting)
    (folders / "mapping.json").write_text('{"mapping": {"torch.nn.Linear": "MXFP4"}}')
    check(folders / "plain", setting | {"quant_mapping": str(folders / "mapping.json")})


def run(folders: Path, start: str, output: str, *flags: str) -> dict:
    main.main(
        [
            "--model_name_or_path", str(folders / start), "--dataset", str(folders / "data.jsonl"), "--eval_size", "4",
            "--output_dir", str(folders / output), "--disable_tqdm", "True", "--report_to", "none", "--report", "False",
            "--do_eval", "True", *flags,
        ]
    )  # fmt: skip
    return json.loads((folders / output / "all_results.json").read_text())


def never(*_args, **_kwargs):
    raise AssertionError("the run went on")


def test_main_refuses_before_it_reads_weights_or_data(folders, monkeypatch):
    monkeypatch.setattr(main, "make_supervised_data_module", never)
    cache = ("--distill_teacher", "cache", "--quant_scheme", "MXFP4")
    for sizes in (("261", "1"), ("200", "61")):
        with pytest.raises(ValueError, match=f"--distill_top_k {sizes[0]} .*{sizes[1]} are more than the 260 tokens"):
            run(folders, "plain", "refused", *cache, "--distill_top_k", sizes[0], "--distill_samples", sizes[1])
    with pytest.raises(AssertionError, match="went on"):
        run(folders, "plain", "refused", *cache, "--distill_top_k", "200", "--distill_samples", "60")
    monkeypatch.setattr(Start, "load_model", never)
    with pytest.raises(ValueError, match="the teacher would be a copy"):
        run(folders, "packed", "refused", "--distill", "True")


def test_a_packed_model_is_compared_with_the_model_that_it_came_from_and_a_trained_one_with_itself(folders):
    packed = run(folders, "packed", "a", "--teacher_model_name_or_path", str(folders / "plain"))
    trained = run(folders, "trained", "b", "--distill_teacher", "self")
    # One function in two ways: the "trained" weights are the plain ones. BF16 copies round norms and embeddings too.
    assert 0 < packed["eval_kl"] == pytest.approx(trained["eval_kl"], rel=0.05)


def test_an_evaluation_of_a_packed_model_computes_with_its_weights_and_not_with_rounded_ones(folders, caplog):
    """INT4's absmax would take other scales from the packed values."""
    save_qat(folders / "int4", {"torch.nn.Linear": "INT4_G32"})
    export_checkpoint(folders / "int4", folders / "int4-packed")
    trained, packed = (run(folders, name, f"{name}-evaluated")["eval_loss"] for name in ("int4", "int4-packed"))
    assert packed == trained and "change when rounded again" not in caplog.text
    rounded = run(folders, "int4-packed", "rounded", "--quant_scheme", "INT4_G32")["eval_loss"]
    assert rounded != trained and "change when rounded again" in caplog.text


def test_a_start_from_a_foreign_model_may_refresh_the_scales_that_it_brings(folders):
    scales = scales_of_checkpoint(folders / "plain", "NVFP4", ("lm_head",), str(folders / "data.jsonl"), 4)
    export_checkpoint(folders / "plain", folders / "nvfp4", scheme="NVFP4", calibrated_scales=scales)
    (folders / "nvfp4" / "qat_config.json").unlink()
    train = ("--do_train", "True", "--max_steps", "1", "--input_scale_refresh", "1", "--export_format", "none")
    run(folders, "nvfp4", "refreshed", *train, "--per_device_train_batch_size", "2")
    assert QATConfig.load(folders / "refreshed").calibrated_scales.keys() == scales.keys()


def test_a_refresh_of_scales_in_an_evaluation_is_refused(folders, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folders, "plain", "refused", "--quant_scheme", "NVFP4", "--input_scale_refresh", "3")
    assert "--input_scale_refresh 3 has no effect without --do_train True" in capsys.readouterr().err


def test_a_stream_is_evaluated_and_calibrates_without_a_number_of_steps(folders):
    stream = ("--streaming", "True", "--kv_cache_scheme", "FP8")
    assert run(folders, "plain", "streamed", "--quant_scheme", "NVFP4", *stream)["eval_loss"] > 0
