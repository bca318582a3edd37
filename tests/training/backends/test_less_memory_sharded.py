"""Settings that need less memory, under FSDP2: offloading on one device, and steps in backward on two."""

from __future__ import annotations

import pytest
import torch
from helpers import save_llama, write_conversations
from sharded_runs import Workspace

QAT = {"quant_scheme": "MXFP4", "max_steps": 4, "max_grad_norm": 0.0}
BF16 = QAT | {"master_dtype": "bfloat16"}
SAVED = QAT | {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("memory")
    save_llama(folder / "model", layers=1)
    write_conversations(folder / "data.jsonl", 80)
    workspace = Workspace(folder)
    two = {"per_device_train_batch_size": 4}
    workspace.run("cpu", {"one": QAT, "one-bf16": BF16, "one-of-4": BF16 | two}, processes=1)
    return workspace


def check_equal(workspace: Workspace, name: str, expected: str) -> None:
    assert workspace.losses(name) == workspace.losses(expected)
    weights = workspace.weights(expected)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in workspace.weights(name).items())


def test_one_process_that_offloads_trains_the_same_bits_and_resumes_exactly(workspace):
    flags = ("--fsdp_activation_checkpointing", "false")
    workspace.run("fsdp2_offload", {"offloaded": SAVED}, *flags, processes=1)
    check_equal(workspace, "offloaded", "one")
    resumed = SAVED | {"resume_from_checkpoint": str(workspace.folder / "offloaded" / "checkpoint-2")}
    workspace.run("fsdp2_offload", {"resumed": resumed}, *flags, processes=1)
    check_equal(workspace, "resumed", "offloaded")


def test_steps_in_backward_on_two_processes_are_those_after_it(workspace):
    runs = {"after": QAT, "within": SAVED | {"optimizer_in_backward": True}}
    workspace.run("fsdp2", runs)
    check_equal(workspace, "within", "after")
    norms = [workspace.logged(name, "grad_norm") for name in ("within", "after")]  # of hooks, and of Trainer
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and min(norms[0]) > 0
    resumed = runs["within"] | {"resume_from_checkpoint": str(workspace.folder / "within" / "checkpoint-2")}
    workspace.run("fsdp2", {"within-resumed": resumed})
    check_equal(workspace, "within-resumed", "within")


def test_without_masters_one_process_has_the_bits_of_no_sharding(workspace):
    alone = BF16 | {"optimizer_in_backward": True}
    workspace.run("fsdp2_offload", {"bf16-offloaded": alone}, "--fsdp_activation_checkpointing", "false", processes=1)
    check_equal(workspace, "bf16-offloaded", "one-bf16")


def test_without_masters_two_processes_train_as_one_and_resume_exactly(workspace):
    saved = BF16 | {"save_strategy": "steps", "save_steps": 2, "optimizer_in_backward": True}
    workspace.run("fsdp2", {"bf16-two": saved})
    assert workspace.losses("bf16-two") == pytest.approx(workspace.losses("one-of-4"), rel=2e-3)
    workspace.run("ddp", {"bf16-ddp": BF16})
    assert workspace.losses("bf16-ddp") == pytest.approx(workspace.losses("one-of-4"), rel=2e-3)
    resumed = saved | {"resume_from_checkpoint": str(workspace.folder / "bf16-two" / "checkpoint-2")}
    workspace.run("fsdp2", {"bf16-two-resumed": resumed})
    check_equal(workspace, "bf16-two-resumed", "bf16-two")
