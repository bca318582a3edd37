"""Mixtures of experts in two gloo processes train what one process trains; experts are sharded along E.

As in test_sharded.py, the one process accumulates over two batches. Every process computes on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import make_mixture, make_tokenizer, write_conversations
from processes import SECONDS, fork
from sharded_runs import Workspace
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from qat import QATConfig, prepare_qat
from qat.layers.finish import finished_weights
from qat.layers.learned import optimizer_settings
from qat.layers.sites import quantized_sites
from training.backends.parameter_groups import separate
from training.backends.sharding import round_parameters

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


# ---- Without a Trainer ----

LEARNS = {"MXFP4": {"learn_exponent": True}, "NVFP4A16": {"learn_scale": True}}
RATES = optimizer_settings(exponents=0.4, scales=0.05)


def train(model: nn.Module, parts: Sequence[int], steps: int = 3) -> None:
    """Steps of Adam on the mean loss of some parts of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    separate(optimizer, model, RATES)
    batch = torch.randint(2, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        for part in parts:
            ids = batch[part : part + 1]
            (model(input_ids=ids, labels=ids, use_cache=False).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model: nn.Module) -> nn.Module:
    """By decoder layer, as TRANSFORMER_BASED_WRAP does."""
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """What would be saved."""
    return finished_weights(model, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), {})


@pytest.fixture
def process_group(tmp_path):
    """A group of one process: parameters become DTensors, as in any size of group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("scheme", LEARNS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_sharded_model_trains_to_the_same_bits(process_group, kind, scheme):
    models = [prepare_qat(make_mixture(kind), {nn.Linear: scheme}, **LEARNS[scheme]) for _ in range(2)]
    shard(models[1])
    offsets = [site.module.weight_quantizer.learned[0] for site in quantized_sites(models[1]) if site.kind == "experts"]
    assert len(offsets) == 4 and all(isinstance(o, DTensor) and o.ndim == 3 for o in offsets)
    for model in models:
        train(model, (0, 1))
    expected, found = map(whole, models)
    assert found.keys() == expected.keys() == make_mixture(kind).state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def train_sharded(rank: int, folder: Path, experts: int) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = shard(make_prepared(experts))
    site = next(site for site in quantized_sites(model) if site.kind == "experts")
    (offset,) = site.module.weight_quantizer.learned
    shapes = [tuple(parameter.to_local().shape) for parameter in (site.weight, offset)]
    train(model, (rank,))
    state = whole(model)
    round_parameters(model, {name: torch.bfloat16 for name, _ in make_prepared(experts).named_parameters()})
    rounded = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.save((shapes, state, rounded), folder / f"{rank}.pt")
    dist.destroy_process_group()


def make_prepared(experts: int) -> nn.Module:
    model = make_mixture(experts=experts, chosen=min(experts, 2), layers=1)
    return prepare_qat(model, {nn.Linear: "MXFP4"}, learn_exponent=True)


@pytest.mark.parametrize(("experts", "each"), [(3, (2, 1)), (1, (1, 0))])
def test_experts_that_processes_share_unevenly_train_as_in_one_process(tmp_path, experts, each):
    processes = [fork(train_sharded, rank, tmp_path, experts) for rank in range(2)]
    model = make_prepared(experts)
    train(model, (0, 1))
    expected = finished_weights(model, model.state_dict(), {})
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    for rank, count in enumerate(each):
        shapes, state, rounded = torch.load(tmp_path / f"{rank}.pt")
        assert shapes == [(count, 192, 64), (count, 192, 2)]
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
        masters = [tensor for name, tensor in rounded.items() if "offset" not in name]
        assert masters and all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)
