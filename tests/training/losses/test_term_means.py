"""The terms of the training loss in the log, against losses computed from whole logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import make_llama
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import make_data, make_trainer, other_llama
from transformers.integrations import TensorBoardCallback

from training.losses.term_means import TermMeans
from training.monitoring.report import write_report

FLAGS = {"bf16": False, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}


def logs_of(folder, teacher, **kwargs) -> list[dict]:
    trainer = make_trainer(folder, make_llama(), make_data(folder), teacher, **{**FLAGS, **kwargs})
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def direct(data: dict, samples: range, teacher, temperature: float) -> tuple[float, float, int]:
    """Mean cross-entropy and divergence of the labelled tokens of some samples, one sample at a time; their number."""
    ce, kl = [], []
    for i in samples:
        batch = data["data_collator"]([data["train_dataset"][i]])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            ours, theirs = (model(**batch).logits[0, :-1][labels != -100].double() for model in (make_llama(), teacher))
        ce.append(F.cross_entropy(ours, labels[labels != -100], reduction="none"))
        log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (ours, theirs))
        kl.append((log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2)
    ce, kl = torch.cat(ce), torch.cat(kl)
    return ce.mean().item(), kl.mean().item(), len(ce)


@pytest.mark.parametrize("batch,accumulation,every", [(3, 1, 1), (1, 3, 1), (3, 1, 2), (1, 3, 2)])
def test_logged_terms_are_means_over_the_labelled_tokens_since_the_last_entry(tmp_path, batch, accumulation, every):
    data, teacher = make_data(tmp_path), other_llama()
    logs = logs_of(
        tmp_path, copy.deepcopy(teacher), distill_ce_weight=0.2, distill_temperature=2.0, logging_steps=every,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert len(logs) == 2 // every
    for number, entry in enumerate(logs):
        samples = range(number * 3 * every, (number + 1) * 3 * every)
        ce, kl, _ = direct(data, samples, teacher, 2.0)
        assert (entry["ce"], entry["kl"]) == pytest.approx((ce, kl), rel=1e-4)
        assert entry["perplexity"] == pytest.approx(math.exp(ce), rel=1e-4)
        if every == 1:  # else the loss is a mean of steps with different numbers of tokens
            assert entry["loss"] == pytest.approx(0.2 * entry["ce"] + 0.8 * entry["kl"], rel=1e-5)


def test_a_term_without_weight_is_not_logged(tmp_path):
    divergence, cross_entropy = logs_of(tmp_path, other_llama())[0], logs_of(tmp_path, None)[0]
    assert divergence["kl"] == pytest.approx(divergence["loss"], rel=1e-5)
    assert "ce" not in divergence and "perplexity" not in divergence
    assert cross_entropy["perplexity"] == pytest.approx(math.exp(cross_entropy["loss"]), rel=1e-5)
    assert "kl" not in cross_entropy and "ce" not in cross_entropy  # which is the loss
    assert "perplexity" not in logs_of(tmp_path, None, label_smoothing_factor=0.1)[0]  # a loss of transformers' own


def test_terms_not_yet_logged_outlive_a_restart(tmp_path):
    flags = {"distill_ce_weight": 0.5, "max_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = logs_of(tmp_path, other_llama(), **flags)
    trainer = make_trainer(tmp_path, make_llama(), make_data(tmp_path), other_llama(), **FLAGS, **flags)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "ce", "kl", "labelled_tokens"):
        assert [entry[name] for entry in resumed] == pytest.approx([entry[name] for entry in whole], rel=1e-6)


def test_evaluation_between_two_entries_is_not_counted(tmp_path):
    flags = {"distill_ce_weight": 0.5, "logging_steps": 2}
    apart = logs_of(tmp_path, other_llama(), **flags, eval_strategy="steps", eval_steps=1)
    assert apart[0]["ce"] == pytest.approx(logs_of(tmp_path, other_llama(), **flags)[0]["ce"], rel=1e-6)


def test_a_batch_that_is_no_number_is_left_out_as_trainer_leaves_out_its_loss():
    means = TermMeans(("ce", "kl"), Accelerator(cpu=True))
    for rows in ([[1.0, 4.0], [3.0, 2.0]], [[float("nan"), 1.0]], [[2.0, 6.0]]):
        means.add(torch.tensor(rows))
    assert means.take() == pytest.approx({"ce": 2.0, "kl": 4.0, "perplexity": math.exp(2.0)})
    assert means.take() == {}


def test_sums_of_any_number_of_processes_are_taken_up_and_those_of_other_terms_are_not():
    means = TermMeans(("ce", "kl"), Accelerator(cpu=True))
    means.restore([{"ce": 2.0, "kl": 3.0, "tokens": 1.0}, {"ce": 4.0, "kl": 0.0, "tokens": 2.0}])
    means.restore([{"kl": 50.0, "tokens": 1.0}])
    assert means.take() == pytest.approx({"ce": 2.0, "kl": 1.0, "perplexity": math.exp(2.0)})


def test_terms_show_in_tensorboard_and_in_the_report(tmp_path):
    flags = {**FLAGS, "distill_ce_weight": 0.2}
    trainer = make_trainer(tmp_path, make_llama(), make_data(tmp_path), other_llama(), **flags)
    trainer.add_callback(TensorBoardCallback)
    trainer.train()
    history = trainer.state.log_history
    (event_file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(event_file))
    events.Reload()
    report = write_report(tmp_path, history, {}, "A run").read_text()
    for name in ("ce", "kl", "perplexity"):
        values = [entry[name] for entry in history if name in entry]
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(values) and len(values) == 2
        assert f"| {name} | {values[0]:.4g} | {values[1]:.4g} | {min(values):.4g} |" in report


def test_cross_entropy_shares_the_panel_of_eval_loss_and_a_blend_does_not(tmp_path, monkeypatch):
    history = [{"step": 1, "loss": 1.0, "ce": 3.0, "kl": 0.5}, {"step": 1, "eval_loss": 2.9, "eval_kl": 0.6}]
    panels = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: panels.append([line.get_label() for line in axes.lines]))
    write_report(tmp_path, history, {}, "A run")
    assert panels == [["ce", "eval_loss"], ["loss"], ["eval_kl", "kl"]]
