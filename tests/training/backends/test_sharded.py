"""DDP, FSDP1 and FSDP2 in two gloo processes train what one process trains, and save one whole checkpoint.

The one process accumulates over two batches, so that both see the same batches and round the same BF16 gradients; what
may differ is the order of sums. Every process computes on one thread. A true `accelerate launch` trains the stages of
DDP, all in one, since importing takes most of the time, and FSDP2 on two machines; all other runs are forked, under the
variables that the launcher computes for their accelerate_config.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from helpers import ROOT, save_llama, write_conversations
from processes import free_port
from safetensors.torch import load_file
from sharded_runs import Workspace
from transformers import AutoModelForCausalLM

from qat import QATConfig

BACKENDS = ("ddp", "fsdp1", "fsdp2")
QAT = {"quant_scheme": "MXFP4"}
STAGES = {  # FP32 shows sums in another order as what they are; BF16 adds a rounding of half a percent to some of them
    "fp32": ({"bf16": False}, 1e-6),
    "bf16": ({}, 1e-3),
    "mxfp4": (QAT | {"save_strategy": "steps", "save_steps": 5, "do_eval": True, "eval_strategy": "steps",
                     "eval_steps": 5}, 1e-3),
    "distill": (QAT | {"distill": True, "smooth_alpha": "auto", "input_transform": "hadamard", "packing": True,
                       "weight_init": "gptq", "model_max_length": 64, "max_steps": 4}, 1e-3),
    # Scales that layers share, of weights in each step, of inputs from samples and again in training.
    "nvfp4": ({"quant_scheme": "NVFP4", "input_scale_refresh": 3, "max_steps": 4}, 1e-3),
}  # fmt: skip

MACHINES = QAT | {"max_steps": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("sharded")
    save_llama(folder / "model")
    write_conversations(folder / "data.jsonl", 80)
    workspace = Workspace(folder)
    one = {"gradient_accumulation_steps": 2}
    runs = {f"one-{stage}": flags | one for stage, (flags, _) in STAGES.items()} | {"one-machine": MACHINES | one}
    workspace.run("cpu", runs, processes=1)
    return workspace


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, workspace) -> str:
    train = workspace.run if request.param == "fsdp2" else workspace.launch  # below, two machines launch it
    train(request.param, {f"{request.param}-{stage}": flags for stage, (flags, _) in STAGES.items()})
    return request.param


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_equal_those_of_one_process(workspace, backend, stage):
    expected, found = (workspace.losses(f"{name}-{stage}") for name in ("one", backend))
    assert len(found) == len(expected) >= 4
    assert found == pytest.approx(expected, rel=STAGES[stage][1])
    assert found[0] == pytest.approx(expected[0], rel=1e-6)  # before any update, nothing can drift apart
    check_weights(workspace.weights(f"{backend}-{stage}"), workspace.weights(f"one-{stage}"))


def test_calibrated_scales_equal_those_of_one_process(workspace, backend):
    expected, found = (QATConfig.load(workspace.folder / f"{name}-nvfp4") for name in ("one", backend))
    assert found.calibrated_scales == pytest.approx(expected.calibrated_scales, rel=1e-2) and found.calibrated_scales


def check_weights(found: dict, expected: dict) -> None:
    """The same names (tied weights once), in BF16, with the same values but for drift far below what training moved."""
    assert found.keys() == expected.keys() and "lm_head.weight" not in found
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in expected.items():  # ten steps of Adam at 1e-3 move a weight by up to 5e-3
        difference = (found[name].float() - tensor.float()).abs()
        assert difference.mean() < 5e-5 and difference.max() < 8e-3, name


def test_what_is_evaluated_is_what_is_saved(workspace, backend):
    found, expected = (
        json.loads((workspace.folder / f"{name}-mxfp4" / "eval_results.json").read_text())["eval_loss"]
        for name in (backend, "one")
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(workspace, backend):
    name = f"{backend}-resumed"
    whole = workspace.folder / f"{backend}-mxfp4"
    flags = STAGES["mxfp4"][0] | {"resume_from_checkpoint": str(whole / "checkpoint-5")}
    workspace.run(backend, {name: flags})
    assert workspace.losses(name) == pytest.approx(workspace.losses(whole.name), rel=1e-6)
    for key, tensor in workspace.weights(name).items():
        torch.testing.assert_close(tensor, workspace.weights(whole.name)[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", ["fsdp1", "fsdp2"])
def test_checkpointed_activations_and_full_state_dicts_change_nothing(workspace, version):
    runs = {
        f"{version}-checkpointed": STAGES["mxfp4"][0],
        f"{version}-gathered": QAT | {"fsdp_gather_dtype": "bfloat16"},
    }
    flags = ("--fsdp_activation_checkpointing", "true", "--fsdp_state_dict_type", "FULL_STATE_DICT")
    workspace.run(version, runs, *flags)
    assert workspace.losses(f"{version}-checkpointed") == pytest.approx(workspace.losses("one-mxfp4"), rel=1e-3)
    check_weights(workspace.weights(f"{version}-checkpointed"), workspace.weights("one-mxfp4"))
    # Gathered BF16 is another arithmetic (norms, embeddings, residual stream): near in losses, weights not compared.
    assert workspace.losses(f"{version}-gathered") == pytest.approx(workspace.losses("one-mxfp4"), rel=1e-2)
    assert workspace.weights(f"{version}-gathered").keys() == workspace.weights("one-mxfp4").keys()
    masters = load_file(workspace.folder / f"{version}-checkpointed" / "checkpoint-5" / "model.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def test_parameters_offloaded_to_the_cpu_train_the_same_model(workspace):
    workspace.run("fsdp2", {"fsdp2-offloaded": QAT}, "--fsdp_offload_params", "true")
    assert workspace.losses("fsdp2-offloaded") == pytest.approx(workspace.losses("one-mxfp4"), rel=1e-3)
    check_weights(workspace.weights("fsdp2-offloaded"), workspace.weights("one-mxfp4"))


def test_local_state_dicts_end_in_one_whole_checkpoint(workspace):
    workspace.run("fsdp1", {"fsdp1-local": QAT | {"max_steps": 1}}, "--fsdp_state_dict_type", "LOCAL_STATE_DICT")
    _, info = AutoModelForCausalLM.from_pretrained(workspace.folder / "fsdp1-local", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert workspace.weights("fsdp1-local").keys() == workspace.weights("one-mxfp4").keys()


def test_two_machines_that_meet_by_rendezvous_train_the_same_model(workspace):
    """Each machine is a launcher of its own, by scripts/slurm.sh as without Slurm; both are this one."""
    run = workspace.write("machines", MACHINES)
    env = {
        **os.environ, "NNODES": "2", "GPUS_PER_NODE": "1", "MAIN_ADDRESS": "localhost", "MAIN_PORT": str(free_port()),
        "MAIN": "tests/fsdp_on_cpu.py", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), str(run)]
    machines = [
        subprocess.Popen(
            command, env=env | {"MACHINE_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in ("0", "1")
    ]
    for machine in machines:
        output, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, output[-4000:]
    assert workspace.losses("machines") == pytest.approx(workspace.losses("one-machine"), rel=1e-3)
    check_weights(workspace.weights("machines"), workspace.weights("one-machine"))
