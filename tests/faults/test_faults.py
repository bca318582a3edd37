"""A handful of injected faults, one of each family; `bash scripts/soak.sh 25` injects more."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.files.manifest import describe, write_manifest

from .injected import AtEvaluation, AtOperation, AtStep, NanLoss
from .kinds import KINDS, Reference
from .runs import Job, difference, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def reference(workspace) -> Reference:
    return Reference.make(workspace, "MXFP4")


@pytest.fixture(scope="module")
def two_processes(workspace) -> Reference:
    return Reference.make(workspace, "MXFP4, evaluated, two processes")


@pytest.mark.parametrize("name", ["final", "damage", "disk", "readonly", "cache"])
def test_a_run_survives_in_one_process(reference, name):
    kind = next(kind for kind in KINDS if kind.name == name)
    kind.inject(reference.job(name), reference, random.Random(7))


@pytest.mark.parametrize("name", ["term", "peer", "evaluation"])
def test_a_run_survives_in_two_processes(two_processes, name):
    kind = next(kind for kind in KINDS if kind.name == name)
    kind.inject(two_processes.job(f"{name}2"), two_processes, random.Random(7))


EVERYTHING = (
    "--quant_scheme", "MXFP8", "--distill", "True", "--packing", "True", "--model_max_length", "64",
    "--group_by_length", "True",
)  # fmt: skip


@pytest.mark.parametrize("flags", [EVERYTHING, ("--streaming", "True")], ids=["everything", "stream"])
def test_killed_in_the_second_epoch_and_continued_equals_uninterrupted(workspace, flags):
    whole, killed = (Job(workspace, f"{len(flags)}-{name}", flags) for name in ("whole", "killed"))
    whole.finish()
    assert killed.start(AtStep(14)).wait() == [-9]
    assert "Resuming from" in killed.finish()
    assert difference(whole.output, killed.output) is None


def test_two_processes_continue_what_one_began_with_the_same_samples(workspace):
    flags = ("--quant_scheme", "MXFP4", "--group_by_length", "True", "--logging_steps", "1")
    flags = (*flags, "--bf16", "False", "--model_name_or_path", str(_without_dropout(workspace)))
    whole, moved = Job(workspace, "one", flags), Job(workspace, "moved", flags)
    whole.finish()
    assert moved.start(AtStep(13)).wait() == [-9]
    moved.count = 2
    assert "resuming with 2 processes a run that 1 began" in moved.finish()
    losses = [_losses(job.output) for job in (whole, moved)]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 8
    assert all(losses[1][step] == pytest.approx(loss, rel=2e-3) for step, loss in losses[0].items())


def _without_dropout(workspace: Path) -> Path:
    folder = workspace / "plain"
    folder.mkdir()
    for path in (workspace / "model").iterdir():
        text = path.read_bytes()
        (folder / path.name).write_bytes(text.replace(b'"attention_dropout": 0.1', b'"attention_dropout": 0.0'))
    return folder


def _losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_the_only_complete_checkpoint_outlives_a_kill_while_the_next_is_written(workspace):
    flags = ("--save_total_limit", "1")
    job = Job(workspace, "limit", flags)
    job.start(AtOperation("/limit/.checkpoint-4.partial", 9)).wait()
    assert [path.name for path in job.checkpoints] == ["checkpoint-2"]
    text = job.finish()
    assert "removing" in text and ".checkpoint-4.partial" in text and "Resuming from" in text
    assert [path.name for path in job.checkpoints] == ["checkpoint-8"]
    assert not list(job.output.rglob("*.bin"))  # training_args.json, no pickle


def test_a_second_run_in_the_folder_is_refused_by_all_its_processes_and_the_first_can_be_continued(reference):
    job = reference.job("twice")
    first = job.start(AtStep(13, signal.SIGSTOP))
    while not job.checkpoints:
        assert first.processes[0].is_alive(), first.text()
        time.sleep(0.05)
    job.count = 2
    second = job.start()
    assert second.wait() == [2, 2] and "in use by another run (process" in second.text()
    assert "Loading weights" not in second.text()
    first.processes[0].kill()
    first.processes[0].join()
    job.count = 1
    assert "Resuming from" in job.finish()
    reference.check(job)


NAN_STEPS = ("--max_nan_steps", "2", "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "9")
MOVES_WEIGHTS = ("--quant_scheme", "MXFP4", "--learn_exponent", "True", "--weight_decay", "0.1")


def test_a_nan_step_that_may_pass_changes_no_weight(workspace):
    job = Job(workspace, "nan-steps", (*NAN_STEPS, *MOVES_WEIGHTS))
    run = job.start(NanLoss(3))
    assert run.wait() == [0] and "step 2 is not applied" in run.text()
    first, second, third = (load_file(path / "model.safetensors") for path in job.checkpoints)
    assert any(name.endswith("exponent_offset") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(second[name], third[name]) for name in first)


def test_more_nan_steps_than_may_pass_end_the_run(workspace):
    run = Job(workspace, "nan-end", (*NAN_STEPS, "--max_nan_steps", "0")).start(NanLoss(3))
    assert run.wait() == [1]
    assert "error: step 2: loss and gradient norm are" in run.text() and "nan-end/checkpoint-1" in run.text()


def test_sigterm_in_the_final_evaluation_saves_what_no_checkpoint_holds(workspace, reference):
    job = Job(workspace, "last", ("--quant_scheme", "MXFP4", "--save_strategy", "no"))
    run = job.start(AtEvaluation(1))
    assert run.wait() == [143] and "SIGTERM: saved at step 8" in run.text()
    job.flags = job.flags[:2]
    job.finish()
    reference.check(job)


def test_sigterm_ends_an_evaluation_alone(workspace):
    job = Job(workspace, "alone")
    run = job.start(AtEvaluation(1, seconds=0.5), "--do_train", "False", "--per_device_eval_batch_size", "1")
    assert run.wait() == [143] and run.text().endswith("ended by SIGTERM\n")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_pickled_into_the_state_of_an_optimizer_is_not_run(reference, workspace):
    job = reference.job("trap")
    shutil.copytree(reference.whole.output, job.output)
    checkpoint = job.checkpoints[-1]
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(_Trap(workspace / "sprung")))
    write_manifest(checkpoint, describe(checkpoint))  # whoever forges the state forges the manifest
    run = job.start()
    assert run.wait() == [1] and "weights_only" in run.text()
    assert not (workspace / "sprung").exists()
