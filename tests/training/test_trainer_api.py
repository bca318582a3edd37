"""QATTrainer takes the arguments of transformers.Trainer: each does what it does there, or is refused."""

from __future__ import annotations

import importlib.machinery
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from helpers import MIXED, make_llama, make_tokenizer
from torch.nn.functional import cross_entropy
from trainers import make_data
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import BestRun, HPSearchBackend

from qat import prepare_qat
from training.trainer import QATTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(data, tmp_path):
    """Makes a trainer with plain arguments of transformers."""

    def make_trainer(kind: type = QATTrainer, options: dict | None = None, **kwargs) -> transformers.Trainer:
        args = transformers.TrainingArguments(
            str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True,
            **{"max_steps": 2, "per_device_train_batch_size": 3, "save_strategy": "no", **(options or {})},
        )  # fmt: skip
        if "model_init" not in kwargs:
            kwargs.setdefault("model", make_llama())
        return kind(args=args, processing_class=make_tokenizer(), **kwargs, **data)

    return make_trainer


def _count(prediction, compute_result: bool = True) -> dict:
    return {"of_metrics": 1.0}


def _summed(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    return cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (
        num_items_in_batch or (labels != -100).sum()
    )


SAME = {
    "logits prepared for no metrics": {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    "metrics": {"compute_metrics": _count},
    "metrics of prepared logits": {
        "compute_metrics": _count, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
    "metrics of lists": {"compute_metrics": _count, "options": {"eval_do_concat_batches": False}},
    "metrics by batch": {"compute_metrics": _count, "options": {"batch_eval_metrics": True}},
    "a loss of the caller's own": {"compute_loss_func": _summed},
    "smoothed labels": {"options": {"label_smoothing_factor": 0.2}},
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_it_trains_and_evaluates_as_trainer_does(make, case):
    ours, theirs = make(**SAME[case]), make(transformers.Trainer, **SAME[case])
    losses = [trainer.train().training_loss for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    metrics = [trainer.evaluate() for trainer in (ours, theirs)]
    if "smoothed" not in case:  # ours is the plain cross-entropy
        assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-3)
    assert ("eval_of_metrics" in metrics[0]) == ("eval_of_metrics" in metrics[1]) == ("compute_metrics" in SAME[case])


@pytest.mark.parametrize("name,value", [("eval_do_concat_batches", False), ("batch_eval_metrics", True)])
def test_options_of_metrics_are_refused_where_the_metrics_are_its_own(make, name, value):
    with pytest.raises(ValueError, match=f"--{name} {value}: loss and perplexity"):
        make(options={name: value})


def test_plain_arguments_are_checked_as_those_of_main_are(make):
    with pytest.raises(ValueError, match="--save_only_model True: checkpoints would lack the optimizer's state"):
        make(options={"save_only_model": True})
    make(options={"do_predict": True})  # a flag that programs read


def test_each_training_begins_with_a_new_quantized_model_that_is_monitored(make):
    def quantized():
        return prepare_qat(make_llama(), MIXED)

    trainer = make(model_init=lambda: quantized(), log_quantization=True, options={"logging_steps": 1})
    losses = [trainer.train().training_loss for _ in range(2)]
    assert losses == pytest.approx([make(model=quantized()).train().training_loss] * 2, rel=1e-6)
    assert trainer.state.log_history[1]["flips/mlp"] > 0


class _TwoRates:
    """A stand-in for a package that searches."""

    def ensure_available(self) -> None: ...

    default_hp_space = None

    def run(self, trainer, n_trials: int, direction: str) -> BestRun:
        results = []
        for number in range(n_trials):
            sys.modules["wandb"].run.id, trial = number, {"learning_rate": 10.0 ** (-2 - number)}
            trainer.train(trial=trial)
            results.append((trainer.compute_objective(trainer.evaluate()), number, trial))
        objective, number, trial = min(results)
        return BestRun(str(number), objective, trial)


def test_hyperparameters_are_searched(make, monkeypatch, tmp_path):
    stub = ModuleType("wandb")
    stub.run, stub.__spec__ = SimpleNamespace(id=0), importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, _TwoRates)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(model_init=lambda: make_llama(), options=options)
    best = trainer.hyperparameter_search(n_trials=2, backend="wandb")
    alone = make(options={"learning_rate": 1e-2})
    alone.train()
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert best.objective == pytest.approx(alone.evaluate()["eval_perplexity"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run-0", "run-1"]


def test_an_optimizer_of_the_callers_own_resumes_and_another_kind_does_not(make):
    def trainer(kind, **options):
        model = make_llama()
        given = kind(model.parameters(), lr=0.1)
        return make(model=model, optimizers=(given, None), options={"save_strategy": "steps", **options})

    trainer(torch.optim.SGD).train()
    with pytest.raises(ValueError, match="--optim torch.optim.sgd.SGD, and this run has torch.optim.adam.Adam"):
        trainer(torch.optim.Adam, max_steps=3).train(resume_from_checkpoint=True)
    resumed = trainer(torch.optim.SGD, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_arguments_by_position_are_trainers(data, make):
    plain = make()
    rest = data["data_collator"], data["train_dataset"], data["eval_dataset"], make_tokenizer(), None, None, _count
    assert "eval_of_metrics" in QATTrainer(make_llama(), plain.args, *rest).evaluate()
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        QATTrainer(make_llama(), model=make_llama())


def test_predictions_are_sums_and_labels_are_counts_of_tokens(make, data):
    output = make().predict(data["eval_dataset"])
    counts = [sum(label != -100 for label in sample["labels"][1:]) for sample in data["eval_dataset"]]
    assert output.predictions.shape == (3,) and output.label_ids.tolist() == counts
    assert output.metrics["test_loss"] == pytest.approx(output.predictions.sum() / sum(counts))


EVALUATED = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 9, "eval_strategy": "steps", "eval_steps": 1,
    "per_device_eval_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1,
}  # fmt: skip
ENDED = {
    "best loaded": {"load_best_model_at_end": True, "save_steps": 1, "metric_for_best_model": "loss"},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
    "only the best": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "by epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "max_steps": 4},
}


@pytest.mark.parametrize("case,batch", zip(ENDED, (2, 5, 3, 2), strict=True))
def test_a_run_that_sigterm_ends_in_an_evaluation_resumes_as_if_it_had_been_done(make, case, batch):
    options = {**EVALUATED, **ENDED[case]}
    whole = make(options=options)
    whole.train()
    history = _figures(whole)
    first = make(options=options)
    first.args.output_dir += f"-{batch}"
    _send_sigterm_in_evaluation(first, batch)
    first.train()
    assert first.was_interrupted and first.exit_status == 143
    assert len(_figures(first)) < len(history)
    rest = make(options=options)
    rest.args.output_dir = first.args.output_dir
    rest.train(resume_from_checkpoint=True)
    assert _figures(rest) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    assert rest.state.best_global_step == whole.state.best_global_step


def _figures(trainer) -> list[dict]:
    names = ("step", "loss", "eval_loss", "learning_rate")
    history = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
    return [entry for entry in history if len(entry) > 1]


def _send_sigterm_in_evaluation(trainer, batch: int) -> None:
    plain, seen = trainer.prediction_step, [0]

    def prediction_step(*args, **kwargs):
        seen[0] += 1
        assert seen[0] <= batch, "the evaluation went on"
        if seen[0] == batch:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args, **kwargs)

    trainer.prediction_step = prediction_step


def test_early_stopping_stops(make):
    options = {**EVALUATED, **ENDED["best loaded"], "max_steps": 5, "greater_is_better": True}
    trainer = make(options=options, callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step == 3
