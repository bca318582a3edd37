"""Learned exponents, learned scales and figures under FSDP2: as without it, though no module holds a whole weight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import make_llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qat import is_quantlinear, prepare_qat
from qat.errors import UserError
from qat.layers.finish import finished_weights
from qat.layers.learned import optimizer_settings
from training.backends.parameter_groups import separate
from training.monitoring.monitor import QuantizationMonitor


@pytest.fixture
def process_group(tmp_path):
    """A group of one process: parameters become DTensors, as in any size of group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(sharded: bool, scheme: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Three steps with every option; the baked weights and the figures."""
    learns = {"learn_exponent": True} if scheme == "MXFP4" else {"learn_scale": True}
    model = prepare_qat(make_llama(), {torch.nn.Linear: scheme}, **learns)
    if sharded:
        for layer in (*model.model.layers, model):
            fully_shard(layer)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    separate(optimizer, model, optimizer_settings(exponents=0.4, scales=0.05))
    monitor = QuantizationMonitor(model, torch.float32)
    state = SimpleNamespace(global_step=0, max_steps=3, logging_steps=1)
    ids = torch.arange(40).reshape(2, 20)
    monitor.on_train_begin(None, state, None)
    for state.global_step in range(3):
        monitor.on_step_begin(None, state, None)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.on_optimizer_step(None, state, None)
        monitor.on_step_end(None, state, None)
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return finished_weights(model, state_dict, {}), monitor.metrics()


@pytest.mark.parametrize("scheme", ["MXFP4", "INT4_G32", "NVFP4A16"])
def test_a_sharded_model_trains_to_the_same_bits(process_group, scheme):
    (whole, whole_figures), (sharded, sharded_figures) = train(False, scheme), train(True, scheme)
    assert whole.keys() == sharded.keys() and not any("_offset" in name for name in whole)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert whole_figures == sharded_figures and whole_figures["flips/mlp"] > 0


def test_layers_that_share_a_divisor_and_are_sharded_one_by_one_are_refused(process_group):
    model = prepare_qat(make_llama(layers=1), {torch.nn.Linear: "NVFP4A16"})
    for module in model.modules():
        if is_quantlinear(module):
            fully_shard(module)
    with pytest.raises(UserError, match="let it wrap whole decoder layers"):
        model(input_ids=torch.arange(20)[None])
