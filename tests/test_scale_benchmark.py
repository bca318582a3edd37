"""The parts of benchmarks/scale.py that need no run: its words, figures, ratios, and what runs read."""

from __future__ import annotations

import tempfile
from math import prod
from threading import Thread

import pytest

from benchmarks.launch import last_error
from benchmarks.scale import Devices, parse_arguments
from benchmarks.scale_figures import figures, figures_resumed, ratios
from benchmarks.scale_inputs import SHAPES, make_tokenizer, skeleton, stored_tensors, write_data, write_model
from benchmarks.scale_run import Run
from data.supervised import make_supervised_data_module
from qat.checkpoints.load import load_plain
from qat.errors import UserError


def test_a_run_is_read_from_its_words_in_any_order():
    run = Run.parse("4:MXFP4:resume:16384:samples8:30b-a3b:rows1", "8b")
    assert (run.gpus, run.stage, run.tokens, run.samples, run.rows, run.shape) == (4, "MXFP4", 16384, 8, 1, "30b-a3b")
    assert run.resumes and not run.exports and run.attention == "sdpa"
    run = Run.parse("2:BF16", "8b")
    assert (run.tokens, run.rows, run.shape, run.resumes) == (2048, 2, "8b", False)


@pytest.mark.parametrize("name", ["MXFP4", "0:BF16", "2:FP4", "2:BF16:rows0", "2:BF16:sdpa2", "2:BF16:32:samples4"])
def test_a_wrong_run_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=f"--runs '{name}'"):
        Run.parse(name, "8b")


def test_runs_need_the_gpus_that_they_name():
    with pytest.raises(UserError, match="'65:BF16' needs 65 GPUs"):
        parse_arguments(["--runs", "2:BF16,65:BF16", "--device", "cpu"])


def test_runs_work_in_a_new_temporary_folder_that_is_printed_unless_one_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (parse_arguments(["--runs", "1:BF16", "--device", "cpu"]).work for _ in range(2))
    assert first != second and first.parent == tmp_path.resolve() and f"--work {first}" in capsys.readouterr().out
    assert parse_arguments(["--runs", "1:BF16", "--device", "cpu", "--work", str(tmp_path)]).work == tmp_path.resolve()
    assert parse_arguments(["--device", "cpu"]).work is None and len(list(tmp_path.iterdir())) == 2


def times(steps: int, memory: int) -> dict:
    """A process that began at 100 s: 50 s until the first step, one of 9 s, then steps of 2 s, but one of 30 s."""
    lengths = [9, 2, 2, 30] + [2] * (steps - 4)
    begins = [150 + sum(lengths[:i]) for i in range(steps)]
    parts = {"import": [100, 110], "data": [110, 111], "load": [111, 131], "quantize": [131, 132],
             "find checkpoint": [132, 135], "train begins": [149, 149], "save checkpoint": [190, 200]}  # fmt: skip
    return {
        "parts": parts, "steps": [[b, b + n] for b, n in zip(begins, lengths, strict=True)], "losses": [3.0, 2.0],
        "row_tokens": 1000, "memory": {"allocated": memory, "reserved": memory + 1},
    }  # fmt: skip


def test_figures_are_the_median_after_the_warm_up_and_the_largest_memory():
    found = figures([times(8, 5 * 10**9), times(8, 7 * 10**9)], rows=2, begin=90)
    assert found["step_s"] == 2 and found["tokens_s_gpu"] == 1000 and found["peak_gb"] == 7
    assert (found["start_s"], found["import_s"], found["load_s"], found["prepare_s"]) == (60, 20, 21, 14)
    assert (found["first_step_s"], found["save_s"], found["export_s"]) == (9, 10, "")
    assert (found["loss_first"], found["loss_last"]) == (3, 2)
    resumed = figures_resumed([times(4, 0)], begin=100)
    assert (resumed["resume_s"], resumed["check_s"], resumed["restore_s"]) == (50, 3, 14)


def test_ratios_compare_rows_that_differ_in_one_thing():
    alike = {"shape": "8b", "layers": 32, "row_tokens": 2048, "rows_a_gpu": 2, "samples_a_row": 1, "attention": "sdpa"}
    speeds = {(2, "BF16"): "100", (2, "MXFP4"): "110", (4, "MXFP4"): "99", (4, "distilled"): ""}
    rows = [
        {"gpus": str(gpus), "stage": stage, "tokens_s_gpu": speed, "device": "x", **alike}
        for (gpus, stage), speed in speeds.items()
    ]
    rows.append({**rows[0], "row_tokens": 16384, "gpus": "4", "stage": "BF16"})
    found = {name.partition(" (")[0]: value for name, value in ratios(rows).items()}
    assert found == {"MXFP4 over BF16, 2 GPUs": pytest.approx(1.1), "MXFP4, 4 GPUs over 2": pytest.approx(0.9)}


def test_a_failed_run_is_told_by_its_exception(tmp_path):
    log = tmp_path / "log"
    log.write_text("raise ValueError(\n[rank0]: ValueError: too large\nChildFailedError: \n====\n")
    assert last_error(log) == "[rank0]: ValueError: too large"
    log.write_text("INFO x\nerror: --quant_scheme: no\n[rank1] RuntimeError: later\n")
    assert last_error(log) == "error: --quant_scheme: no"


def test_devices_are_shared_only_in_parallel():
    together, alone = Devices(list("0123"), True), Devices(list("0123"), False)
    assert [together.take(2), together.take(2)] == [(["0", "1"], 0), (["2", "3"], 1)]
    first, _ = alone.take(2)
    waiting = Thread(target=alone.take, args=(2,), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    alone.give(first)
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_random_models_load_with_all_their_weights(tmp_path, shape):
    config = SHAPES[shape].config(layers=1)
    model = load_plain(write_model(tmp_path / shape, config))
    assert model.num_parameters() == sum(prod(size) for _, size in stored_tensors(model))
    assert model.config.num_hidden_layers == 1
    spread = {name: float(p.detach().float().std()) for name, p in model.named_parameters() if p.ndim > 1}
    assert all(0.017 < value < 0.023 for value in spread.values()), spread


def test_published_shapes_have_the_published_numbers_of_parameters():
    counts = {}
    for name, layers in {"8b": 32, "30b-a3b": 48}.items():
        counts[name] = skeleton(SHAPES[name].config(layers)).num_parameters()
    assert counts == {"8b": 8_030_261_248, "30b-a3b": 30_532_122_624}


@pytest.mark.parametrize("samples", [1, 4])
def test_samples_fill_their_rows_to_the_last_token(tmp_path, samples):
    tokenizer = make_tokenizer(512)
    tokenizer.model_max_length = 64
    path = write_data(tmp_path / "d.jsonl", 512, rows=3, tokens=64, samples=samples)
    model = load_plain(write_model(tmp_path / "tiny", SHAPES["tiny"].config()))
    model.config.use_cache = False
    data = make_supervised_data_module(
        str(path),
        tokenizer,
        packing=True,
        model=model,
        evaluate=False,
        eval_dataset="none",
        data_cache_dir=str(tmp_path / "cache"),
    )
    rows = list(data["train_dataset"])
    assert [len(row["input_ids"]) for row in rows] == [64] * 3
    assert [row["position_ids"].count(0) for row in rows] == [samples] * 3
