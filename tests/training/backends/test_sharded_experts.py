"""Mixtures of experts in two gloo processes train what one process trains; experts are sharded along E.

As in test_sharded.py, the one process accumulates over two batches. Every process computes on one thread.
"""

from __future__ import annotations

import pytest
import torch
from helpers import make_mixture, make_tokenizer, write_conversations
from sharded_runs import Workspace
from transformers import AutoModelForCausalLM

from qat import QATConfig

BACKENDS = ("ddp", "fsdp1", "fsdp2")
RUNS = {
    # Three experts on two processes, with a load-balancing loss, learned exponents, and a checkpoint to resume from.
    "learned": {"quant_scheme": "MXFP4", "learn_exponent": True, "exponent_learning_rate": 0.4, "max_steps": 3,
                "save_strategy": "steps", "save_steps": 2, "do_eval": True},
    # Transposed and interleaved, with biases and an expert that no token reaches; DDP does not look for such.
    "scaled": {"quant_scheme": "NVFP4", "input_scale_refresh": 2, "max_steps": 3, "ddp_find_unused_parameters": False},
}  # fmt: skip
UNREACHED = 2


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("sharded")
    balanced = make_mixture("qwen3_moe", experts=3, output_router_logits=True, router_aux_loss_coef=0.1)
    biased = make_mixture("gpt_oss", experts=4)
    for layer in biased.model.layers:
        layer.mlp.router.bias.data[UNREACHED] = -1e4
    for name, model in (("learned", balanced), ("scaled", biased)):
        model.bfloat16().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        RUNS[name]["model_name_or_path"] = str(folder / name)
    write_conversations(folder / "data.jsonl", 40)
    workspace = Workspace(folder)
    one = {"gradient_accumulation_steps": 2}
    workspace.run("cpu", {f"one-{name}": flags | one for name, flags in RUNS.items()}, processes=1)
    return workspace


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, workspace) -> str:
    """Trained; the run with checkpoints was killed after its first one, in its last step, and resumed."""
    names = {name: f"{request.param}-{name}" for name in RUNS}
    batches = RUNS["scaled"]["max_steps"] + RUNS["learned"]["max_steps"]
    order = ("scaled", "learned")
    workspace.run(request.param, {names[name]: RUNS[name] for name in order}, killed_at=batches)
    assert (workspace.folder / names["learned"] / "checkpoint-2" / "manifest.json").is_file()
    workspace.run(request.param, {names["learned"]: RUNS["learned"]})
    return request.param


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_equal_those_of_one_process(workspace, backend, name):
    expected, found = (workspace.losses(f"{which}-{name}") for which in ("one", backend))
    assert len(found) == len(expected) == 3
    assert found == pytest.approx(expected, rel=1e-4) and found[0] == pytest.approx(expected[0], rel=1e-6)
    weights, others = (workspace.weights(f"{which}-{name}") for which in (backend, "one"))
    assert weights.keys() == others.keys() and not any("_offset" in key for key in weights)
    for key, tensor in others.items():  # three steps of Adam at 1e-3 move a weight by up to 3e-3
        difference = (weights[key].float() - tensor.float()).abs()
        assert difference.mean() < 1e-5 and difference.max() < 4e-3, key


def test_an_expert_that_no_token_reaches_stays_as_it_was(workspace, backend):
    before = AutoModelForCausalLM.from_pretrained(workspace.folder / "scaled").state_dict()
    after = AutoModelForCausalLM.from_pretrained(workspace.folder / f"{backend}-scaled").state_dict()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 4
    for name in experts:
        kept = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
        assert kept == [expert == UNREACHED for expert in range(4)], name


def test_calibrated_scales_equal_those_of_one_process(workspace, backend):
    expected, found = (QATConfig.load(workspace.folder / f"{name}-scaled") for name in ("one", backend))
    assert found.calibrated_scales == pytest.approx(expected.calibrated_scales, rel=1e-2)
    assert "model.layers.0.mlp.experts.down_proj.input_global_scale" in found.calibrated_scales
