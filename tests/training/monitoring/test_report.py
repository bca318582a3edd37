"""The report of a run, from its log history."""

from __future__ import annotations

import math

from helpers import make_llama
from matplotlib import image
from trainers import make_data, make_trainer, other_llama

from training.monitoring.report import collect_curves, run_settings, write_report
from training.teachers.load import load_teacher

HISTORY = [
    {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "epoch": 0.1, "labelled_tokens": 1000},
    {"step": 2, "eval_loss": 2.0, "eval_kl": 0.5, "eval_perplexity": math.exp(2.0), "eval_runtime": 3.0, "epoch": 0.2},
    {"step": 2, "loss": 2.25, "learning_rate": 5e-4, "epoch": 0.2, "labelled_tokens": 2000, "oscillation/mlp": 0.125},
    {"step": 3, "loss": float("nan"), "saturated/attention": 0.01, "saturated/mlp": 0.02, "note": "text"},
    {"step": 3, "train_runtime": 60.0, "train_samples_per_second": 8.0, "train_loss": 2.4, "total_flos": 1e15},
    {"step": 3, "eval_loss": 2.1, "eval_kl": 0.75, "eval_perplexity": math.exp(2.1), "eval_runtime": 3.0, "epoch": 0.3},
]


def rows_of(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells of each table row."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_every_logged_scalar_is_a_curve_and_nothing_else():
    curves = collect_curves(HISTORY)
    assert curves["eval_kl"] == [(2, 0.5), (3, 0.75)] and curves["oscillation/mlp"] == [(2, 0.125)]
    assert set(curves) == {
        "loss", "learning_rate", "labelled_tokens", "eval_loss", "eval_kl", "eval_perplexity", "oscillation/mlp",
        "saturated/attention", "saturated/mlp",
    }  # fmt: skip


def test_tables_hold_last_and_best_figures_totals_and_settings(tmp_path):
    path = write_report(tmp_path / "new", HISTORY, {"quant_scheme": "MXFP4", "unset": None}, "A run")
    rows = rows_of(path.read_text())
    assert rows["eval_kl"] == ["0.5", "0.75", "0.5", "2"]
    assert rows["loss"] == ["2.5", "nan", "2.25", "2"]  # what is no number is never the best
    assert rows["learning_rate"] == ["0.001", "0.0005", "", ""]  # the lowest is not the best
    assert (
        rows["steps"] == ["3"]
        and rows["labelled tokens"] == ["2,000"]
        and rows["training time since the last start"] == ["60 s"]
    )
    assert rows["quant_scheme"] == ["`MXFP4`"] and "unset" not in rows and "![curves](report.png)" in path.read_text()
    pixels = image.imread(path.with_name("report.png"))
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.05  # three columns of panels, and something on them


def test_a_run_without_logs_has_a_report_too(tmp_path):
    assert "| steps | 0 |" in write_report(tmp_path, [], {}, "Nothing").read_text()


def test_the_report_of_a_trainer_names_what_was_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), make_data(tmp_path), load_teacher(other_llama(), None), seed=5)
    trainer.train()
    trainer.evaluate()
    write_report(tmp_path, trainer.state.log_history, run_settings(trainer), "A run")
    rows = rows_of((tmp_path / "report.md").read_text())
    assert rows["quantization"] == ["`none`"] and rows["seed"] == ["`5`"] and float(rows["eval_kl"][1]) > 0
    assert int(rows["labelled tokens"][0].replace(",", "")) > 0
