"""Adapters under DDP and FSDP2 on two gloo processes train what one process trains; checkpoints hold nothing else.

The one process accumulates over two batches, as in test_sharded.py. What may differ is the order of sums.
"""

from __future__ import annotations

import re

import pytest
import torch
from helpers import save_llama, write_conversations
from safetensors.torch import load_file
from sharded_runs import Workspace

from qat.errors import UserError
from training.arguments.parse import parse_arguments

LORA = {"quant_scheme": "MXFP4", "lora_r": 4, "max_steps": 6, "learning_rate": 1e-2}
DISTILLED = LORA | {"distill": True, "packing": True, "model_max_length": 64, "max_steps": 4}
RUNS = {
    "plain": LORA | {"save_strategy": "steps", "save_steps": 3},
    "self": DISTILLED,
    "copy": DISTILLED | {"distill_teacher": "copy"},
    "nvfp4": LORA | {"quant_scheme": "NVFP4", "input_scale_refresh": 2, "max_steps": 3},
}
OF_DDP = ("plain", "self")  # it shards nothing: adapters at the start and refreshed scales are as in one process
BEST = LORA | {
    "load_best_model_at_end": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 3,
    "save_strategy": "steps", "save_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("adapters")
    save_llama(folder / "model")
    write_conversations(folder / "data.jsonl", 80)
    workspace = Workspace(folder)
    one = {"gradient_accumulation_steps": 2}
    runs = {f"one-{name}": flags | one for name, flags in {**RUNS, "best": BEST}.items() if name != "copy"}
    workspace.run("cpu", runs, processes=1)
    return workspace


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def backend(request, workspace) -> str:
    names = OF_DDP if request.param == "ddp" else RUNS
    workspace.run(request.param, {f"{request.param}-{name}": RUNS[name] for name in names})
    return request.param


def factors(workspace: Workspace, name: str) -> dict[str, torch.Tensor]:
    return load_file(workspace.folder / name / "adapter" / "adapter_model.safetensors")


def assert_equal(workspace: Workspace, found: str, expected: str, tolerance: float = 0.0) -> None:
    """The same losses, adapters and merged weights; B, which begins with zeros, has moved by a hundredth or more."""
    assert workspace.losses(found) == pytest.approx(workspace.losses(expected), rel=tolerance)
    assert workspace.weights(found).keys() == workspace.weights(expected).keys()
    own = factors(workspace, expected)
    assert min(factor.abs().max() for name, factor in own.items() if "lora_B" in name) > 0.01
    for name, factor in factors(workspace, found).items():
        torch.testing.assert_close(factor, own[name], rtol=0, atol=tolerance)
    for name, weight in workspace.weights(found).items():
        expected_weight = workspace.weights(expected)[name]
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, expected_weight, rtol=2**-7 if tolerance else 0, atol=tolerance)


def test_two_processes_train_the_adapters_of_one(workspace, backend):
    for name in OF_DDP if backend == "ddp" else ("plain", "self", "nvfp4"):
        assert_equal(workspace, f"{backend}-{name}", f"one-{name}", tolerance=1e-3)


@pytest.mark.parametrize("backend", ["fsdp2"], indirect=True)
def test_the_free_teacher_is_a_copy_bit_for_bit(workspace, backend):
    assert_equal(workspace, "fsdp2-self", "fsdp2-copy")


def test_a_checkpoint_holds_no_model_and_resumes_bit_for_bit(workspace, backend):
    checkpoint = workspace.folder / f"{backend}-plain" / "checkpoint-3"
    tensors = {
        path.name for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".bin", ".pt") or path.is_dir()
    }
    optimizer = "optimizer_0" if backend == "fsdp2" else "optimizer.pt"
    assert tensors == {"adapter_model.safetensors", optimizer, "scheduler.pt"}
    workspace.run(backend, {f"{backend}-resumed": RUNS["plain"] | {"resume_from_checkpoint": str(checkpoint)}})
    assert_equal(workspace, f"{backend}-resumed", f"{backend}-plain")


def test_whole_optimizer_files_recomputed_layers_and_the_best_adapters(workspace):
    """Layers that stay gathered after an evaluation: adapters are saved from, and loaded into, their shards."""
    flags = (
        "--fsdp_activation_checkpointing", "true", "--fsdp_state_dict_type", "FULL_STATE_DICT",
        "--fsdp_reshard_after_forward", "false", "--fsdp_cpu_ram_efficient_loading", "false",
    )  # fmt: skip
    workspace.run("fsdp2", {"best": BEST}, *flags)
    assert_equal(workspace, "best", "one-best", tolerance=1e-3)
    assert (checkpoint := workspace.folder / "best" / "checkpoint-3" / "optimizer.bin").is_file()
    workspace.run("fsdp2", {"best-resumed": BEST | {"resume_from_checkpoint": str(checkpoint.parent)}}, *flags)
    assert_equal(workspace, "best-resumed", "best")
    one = BEST | {"gradient_accumulation_steps": 2, "resume_from_checkpoint": str(checkpoint.parent)}
    with pytest.raises(AssertionError, match="under FSDP with FULL_STATE_DICT, and this run trains without FSDP"):
        workspace.run("cpu", {"elsewhere": one}, processes=1)


@pytest.mark.parametrize("version,flags,message", [
    ("1", (), "FSDP1 .* start with accelerate launch --config_file accelerate_config/fsdp2.yaml"),
    ("2", ("--fsdp_gather_dtype", "bfloat16"), "--fsdp_gather_dtype bfloat16 would round adapters"),
])  # fmt: skip
def test_backends_that_cannot_keep_both_dtypes_are_refused_before_weights_are_read(
    version, flags, message, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "True", "--lora_r", "4", *flags]
    with pytest.raises((SystemExit, UserError)):
        parse_arguments(words)

    assert re.search(message, capsys.readouterr().err)
