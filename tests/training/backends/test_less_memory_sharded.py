"""Settings that need less memory, under FSDP2: offloading on one device, and steps in backward on two."""

from __future__ import annotations

import pytest
import torch
from helpers import save_llama, write_conversations
from sharded_runs import Workspace

QAT = {"quant_scheme": "MXFP4", "max_steps": 4, "max_grad_norm": 0.0}
BF16 = QAT | {"master_dtype": "bfloat16"}
SAVED = QAT | {"save_strategy": "steps", "save_steps": 2}


WITHIN = SAVED | {"optimizer_in_backward": True}
BF16_WITHIN = WITHIN | {"master_dtype": "bfloat16"}
SHARDED = {"within": WITHIN, "bf16-two": BF16_WITHIN}
OFFLOADED = {"offloaded": SAVED, "bf16-offloaded": BF16 | {"optimizer_in_backward": True}}
PLAIN = ("--fsdp_activation_checkpointing", "false")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """All runs, in as few launches as they need; those that resume begin in new processes."""
    folder = tmp_path_factory.mktemp("memory")
    save_llama(folder / "model", layers=1)
    write_conversations(folder / "data.jsonl", 80)
    workspace = Workspace(folder)
    two = {"per_device_train_batch_size": 4}
    workspace.run("cpu", {"one": QAT, "one-bf16": BF16, "one-of-4": BF16 | two}, processes=1)
    workspace.run("ddp", {"bf16-ddp": BF16})
    workspace.run("fsdp2", {"after": QAT, **SHARDED})
    workspace.run("fsdp2", {f"{name}-resumed": resumed(workspace, name, flags) for name, flags in SHARDED.items()})
    workspace.run("fsdp2_offload", OFFLOADED, *PLAIN, processes=1)
    again = {"offloaded-resumed": resumed(workspace, "offloaded", SAVED)}
    workspace.run("fsdp2_offload", again, *PLAIN, processes=1)
    return workspace


def resumed(workspace: Workspace, name: str, flags: dict) -> dict:
    return flags | {"resume_from_checkpoint": str(workspace.folder / name / "checkpoint-2")}


def check_equal(workspace: Workspace, name: str, expected: str) -> None:
    assert workspace.losses(name) == workspace.losses(expected)
    weights = workspace.weights(expected)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in workspace.weights(name).items())


@pytest.mark.parametrize("name", ["offloaded", "bf16-offloaded"])
def test_one_process_that_offloads_trains_the_bits_of_no_sharding(workspace, name):
    check_equal(workspace, name, {"offloaded": "one", "bf16-offloaded": "one-bf16"}[name])


@pytest.mark.parametrize("name", ["offloaded", "within", "bf16-two"])
def test_runs_resume_exactly(workspace, name):
    check_equal(workspace, f"{name}-resumed", name)


def test_steps_in_backward_on_two_processes_are_those_after_it(workspace):
    check_equal(workspace, "within", "after")
    norms = [workspace.logged(name, "grad_norm") for name in ("within", "after")]  # of hooks, and of Trainer
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and min(norms[0]) > 0


@pytest.mark.parametrize("name", ["bf16-two", "bf16-ddp"])
def test_without_masters_two_processes_train_as_one(workspace, name):
    assert workspace.losses(name) == pytest.approx(workspace.losses("one-of-4"), rel=2e-3)
