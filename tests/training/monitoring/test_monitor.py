"""Oscillation and saturation: figures against hand-made histories of weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama, make_mixture
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from qat import prepare_qat
from qat.layers.lora import adapters
from qat.layers.sites import quantized_sites
from training.adapters.inject import add_adapters
from training.monitoring.layer_groups import evenly_spaced, group_of, local_rows, spread_rows
from training.monitoring.monitor import MOMENTUM, ROWS_PER_LAYER, QuantizationMonitor

STATE = SimpleNamespace(global_step=0, max_steps=10, logging_steps=1)


@pytest.mark.parametrize(
    "name,group",
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.3.mlp.down_proj", "mlp"),
        ("model.layers.3.mlp.experts", "experts"),
        ("model.layers.3.mlp.experts.5.w1", "experts"),
        ("model.layers.3.mlp.shared_expert.up_proj", "experts"),
        ("transformer.h.0.attention.dense", "attention"),
        ("model.layers.0.mamba.in_proj", "other"),
    ],
)
def test_layers_are_grouped_by_name(name, group):
    assert group_of(name) == group


def test_samples_reach_from_the_first_to_the_last():
    assert evenly_spaced(list(range(30)), 4) == [0, 10, 19, 29] and evenly_spaced([1, 2], 4) == [1, 2]


def make_monitor() -> tuple[nn.Module, QuantizationMonitor]:
    model = nn.ModuleDict({"mlp": nn.Linear(64, 16, bias=False)})
    nn.init.constant_(model["mlp"].weight, 4.0)  # FLOOR's scale is 1, so is the step below 2
    prepare_qat(model, {"mlp": "MXFP4"})
    monitor = QuantizationMonitor(model, torch.float32)
    monitor.on_train_begin(None, STATE, None)
    return model, monitor


def test_only_changes_that_turn_back_are_oscillations():
    model, monitor = make_monitor()
    weight = model["mlp"].weight.detach()
    # By row: 0 goes up twice, 1 goes up and comes back, 2 does so without crossing a border; nothing else moves.
    for row0, row1, row2 in ((4.9, 5.2, 4.2), (5.2, 4.8, 4.0)):
        weight[0, 1], weight[1, 1], weight[2, 1] = row0, row1, row2
        monitor.on_optimizer_step(None, STATE, None)
    (sample,) = monitor.samples["mlp"]
    assert sample.frequency.nonzero().tolist() == [[1, 1]] and sample.frequency[1, 1].item() == pytest.approx(MOMENTUM)
    figures = monitor.metrics()
    assert figures["oscillation/mlp"] == pytest.approx(1 / 1024, abs=1e-6)
    assert figures["flips/mlp"] == pytest.approx(1.5 / 1024, abs=1e-6)  # row 1 twice, row 0 once, in two steps
    for _ in range(80):
        monitor.on_optimizer_step(None, STATE, None)
    assert monitor.metrics()["oscillation/mlp"] == 0.0


def test_a_scale_that_follows_its_block_is_no_flip():
    model = nn.ModuleDict({"mlp": nn.Linear(64, 16, bias=False)})
    nn.init.constant_(model["mlp"].weight, 1.0)
    prepare_qat(model, {"mlp": "INT4_G32"})
    monitor = QuantizationMonitor(model, torch.float32)
    monitor.on_train_begin(None, STATE, None)
    model["mlp"].weight.detach().mul_(1.1)
    model["mlp"].weight.detach()[0, 1] = 0.5
    monitor.on_optimizer_step(None, STATE, None)
    assert monitor.metrics()["flips/mlp"] == pytest.approx(1 / 1024, abs=1e-6)


def test_saturated_weights_and_inputs_are_counted():
    model, monitor = make_monitor()
    with torch.no_grad():
        model["mlp"].weight[:, 0] = 7.0
    monitor.on_optimizer_step(None, STATE, None)
    monitor.on_step_begin(None, STATE, None)
    x = torch.full((3, 64), 4.0)
    x[0, 0] = x[0, 1] = 6.5
    x[1, 0] = 6.0
    model["mlp"](x)
    monitor.on_step_end(None, STATE, None)
    model["mlp"](torch.full((3, 64), 7.9))  # no longer watched
    figures = monitor.metrics()
    assert figures["saturation_weights/mlp"] == pytest.approx(1 / 64, abs=1e-6)
    assert figures["saturation_inputs/mlp"] == pytest.approx(2 / 192, abs=1e-6)
    assert not model["mlp"]._forward_pre_hooks and "saturation_inputs/mlp" not in monitor.metrics()


def test_figures_of_transformed_layers_are_of_what_they_round():
    """Of 32 equal values one is left, 7 here, beyond the largest that FLOOR's scale of 1 holds; 1.24 itself is held."""
    layers = {name: nn.Linear(64, 32, bias=False) for name in ("up_proj", "down_proj")}
    for layer in layers.values():
        nn.init.constant_(layer.weight, 7 / 32**0.5)
    model = nn.ModuleDict({"mlp": nn.ModuleDict(layers)})
    prepare_qat(model, {nn.Linear: "MXFP4"}, (), "floor", "floor", input_transforms={"down_proj": "hadamard"})
    monitor = QuantizationMonitor(model, torch.float32)
    monitor.inputs = {"mlp": [layers["down_proj"]]}
    monitor.on_train_begin(None, STATE, None)
    monitor.on_optimizer_step(None, STATE, None)
    monitor.on_step_begin(None, STATE, None)
    layers["down_proj"](torch.full((3, 64), 7 / 32**0.5))
    figures = monitor.metrics()
    assert (figures["saturation_weights/mlp"], figures["saturation_inputs/mlp"]) == (1 / 64, 1 / 32)


def test_steps_that_are_not_logged_run_without_hooks():
    model, monitor = make_monitor()
    monitor.on_step_begin(None, SimpleNamespace(global_step=0, logging_steps=2), None)
    assert not model["mlp"]._forward_pre_hooks


def test_a_model_is_sampled_in_every_group():
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4", "*.down_proj": "MXFP8"}, learn_exponent=True)
    monitor = QuantizationMonitor(model, torch.bfloat16)
    monitor.on_train_begin(None, STATE, None)
    monitor.on_step_begin(None, STATE, None)
    model(input_ids=torch.arange(40).reshape(2, 20))
    monitor.on_step_end(None, STATE, None)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_quantizer.exponent_offset.add_(4)  # MXFP8: small values are lost
    monitor.on_optimizer_step(None, STATE, None)
    figures = monitor.metrics()
    names = {f"{kind}/{group}" for kind in ("flips", "oscillation", "saturation_weights", "saturation_inputs")
             for group in ("attention", "mlp")}  # fmt: skip
    assert set(figures) == names and figures["flips/mlp"] > 0 and figures["flips/attention"] == 0
    assert all(0 <= figure <= 1 for figure in figures.values())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # [E, 2I, H]; [E, H, 2I]
def test_experts_are_sampled_along_what_is_summed_over(kind):
    model = prepare_qat(make_mixture(kind), {"*.experts": "MXFP4"}, learn_exponent=True)
    monitor = QuantizationMonitor(model, torch.float32)
    monitor.on_train_begin(None, STATE, None)
    monitor.on_step_begin(None, STATE, None)
    model(input_ids=torch.arange(40).reshape(2, 20))
    monitor.on_step_end(None, STATE, None)
    down = model.model.layers[0].mlp.experts.down_proj.detach()
    rows = down if kind == "mixtral" else down.transpose(1, 2)  # [E, H, I], each with 4 * 64 rows, of which 16 are seen
    for value in (1.0, 1.25, 0.99):
        rows[2, 32, 7] = value  # the largest of its block, by far: MXFP4 has 1 and 1.5 times a power of two
        monitor.on_optimizer_step(None, STATE, None)
    figures = monitor.metrics()
    assert set(figures) == {f"{name}/experts" for name in (
        "flips", "oscillation", "saturation_weights", "saturation_inputs")}  # fmt: skip
    samples = {sample.sites[0].parameter: sample for sample in monitor.samples["experts"]}
    assert len(samples["down_proj"].values) == 2 * 16 and samples["down_proj"].values.shape[1] == 96
    seen = samples["down_proj"].quantize()[0]
    assert torch.equal(seen[8 + 2], rows[2, 32])  # of row 2 * 64 + 32, every 16th is taken


def test_a_conv1d_is_sampled_along_what_is_summed_over():
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_inner": 96}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).float()
    prepare_qat(model, {nn.Linear: "MXFP4"}, learn_exponent=True)
    monitor = QuantizationMonitor(model, torch.float32)
    monitor.on_train_begin(None, STATE, None)
    samples = {sample.values.shape[1]: sample for sample in monitor.samples["mlp"]}
    assert torch.equal(samples[96].quantize()[0], model.transformer.h[0].mlp.c_proj.weight.detach().t()[::4])
    assert sum(len(sample.values) for sample in monitor.samples["attention"]) == 2 * 16
    monitor.on_step_begin(None, STATE, None)
    model(input_ids=torch.arange(40).reshape(2, 20))
    monitor.on_step_end(None, STATE, None)
    monitor.on_optimizer_step(None, STATE, None)
    assert {f"{name}/mlp" for name in ("flips", "saturation_weights", "saturation_inputs")} <= set(monitor.metrics())


def test_a_projections_rows_under_fsdp2_are_those_of_the_experts_of_this_process():
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        model = prepare_qat(make_mixture("gpt_oss"), {"*.experts": "MXFP4"})
        site = next(site for site in quantized_sites(model) if site.parameter == "down_proj")
        whole, mesh = site.weight.detach(), init_device_mesh("cpu", (2,))
        for shards, expected in ((0, whole[2:].transpose(1, 2)), (2, None)):
            local = whole.chunk(2, shards)[1].contiguous()
            shard = DTensor.from_local(local, mesh, [Shard(shards)], run_check=False)
            site.owner.down_proj = nn.Parameter(shard)
            rows = local_rows(site)
            assert (rows is None) if expected is None else torch.equal(rows, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_spread_rows_are_those_of_the_flat_matrix():
    rows = torch.randn(3, 10, 4)
    assert torch.equal(spread_rows(rows, 7), rows.reshape(30, 4)[::4][:7])
    assert torch.equal(spread_rows(rows.transpose(0, 1), 100), rows.transpose(0, 1).reshape(30, 4))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_with_adapters_figures_are_of_the_merged_weights(kind):
    if kind == "linear":
        model = make_llama(layers=1)
    else:
        config = AutoConfig.for_model("gpt2", vocab_size=260, n_embd=64, n_layer=1, n_head=2)
        model = AutoModelForCausalLM.from_config(config)
    prepare_qat(model, {"torch.nn.Linear": "MXFP4"})
    add_adapters(model, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    monitor = QuantizationMonitor(model, torch.bfloat16)
    monitor.on_train_begin(None, STATE, None)
    for adapter in (module.adapter for module in adapters(model).values()):
        adapter.lora_B.data.normal_(0, 0.05)
    monitor.on_optimizer_step(None, STATE, None)
    assert monitor.metrics()["flips/mlp"] > 0.1
    for samples in monitor.samples.values():
        for sample in samples:
            whole = [site.module.rows(site.module.effective_weight()) for site in sample.sites]
            expected = torch.cat([spread_rows(rows, ROWS_PER_LAYER) for rows in whole]).bfloat16()
            assert torch.equal(sample.quantize()[0], expected)
