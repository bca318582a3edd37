"""Quantized weights that a model uses without calling their layers are refused in the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import make_llama, make_mixture
from processes import SECONDS, fork
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from trainers import make_data, make_trainer
from transformers.models.llama.modeling_llama import LlamaMLP

from qat import prepare_qat
from qat.errors import UserError
from qat.layers.experts import QuantExperts
from training.resume.uncalled import UncalledLayers

ALONE = SimpleNamespace(torch_compile=False, world_size=1)


class _Bypassing(LlamaMLP):
    """As fused kernels do, while training only."""

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return F.linear(hidden, self.down_proj.weight.to(x.dtype)) if self.training else self.down_proj(hidden)


def bypassing_llama(layers: tuple[int, ...] = (0, 1), ignore: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    model = make_llama()
    for layer in layers:
        model.model.layers[layer].mlp.__class__ = _Bypassing
    return prepare_qat(model, {"torch.nn.Linear": "MXFP4"}, ignore)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "layers,settings,named",
    [
        ((0, 1), {}, "--ignore 'model.layers.*.mlp.down_proj' "),
        ((1,), {"gradient_accumulation_steps": 2}, "--ignore 'model.layers.1.mlp.down_proj' "),
        ((0,), {"gradient_checkpointing": True}, "--ignore 'model.layers.0.mlp.down_proj' "),
        ((0, 1), {"eval_on_start": True, "eval_strategy": "steps"}, "--ignore 'model.layers.*.mlp.down_proj' "),
    ],
)
def test_layers_that_are_trained_and_never_called_are_refused_before_anything_is_saved(
    tmp_path, layers, settings, named
):
    model = bypassing_llama(layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, make_data(tmp_path), None, save_strategy="steps", save_steps=1, **settings)
    with pytest.raises(UserError, match="without calling") as error:
        trainer.train()
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == 0


@pytest.mark.parametrize("teacher", [None, "copy"])
def test_passes_of_a_teacher_and_of_reentrant_checkpointing_are_told_apart(tmp_path, teacher):
    model = bypassing_llama((0,))
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    teacher = make_llama() if teacher else None
    trainer = make_trainer(tmp_path, model, make_data(tmp_path), teacher, **settings)
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.down_proj'"):
        trainer.train()


def frozen(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.requires_grad = False
    return model


def unused(model: nn.Module) -> nn.Module:
    """A layer that nothing reads."""
    model.model.layers[0].mlp.spare = nn.Linear(64, 64, bias=False)
    return prepare_qat(model, {"torch.nn.Linear": "MXFP4"}, ["lm_head"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: frozen(bypassing_llama()),
        lambda: unused(make_llama()),
        lambda: bypassing_llama(ignore=("lm_head", "model.layers.*.mlp.down_proj")),
        lambda: prepare_qat(make_mixture(), {"torch.nn.Linear": "MXFP4"}, ["lm_head", "*.gate"]),
        bypassing_llama,  # under torch.compile, which is not looked at
    ],
    ids=["frozen", "without a gradient", "ignored", "experts", "compiled"],
)
def test_what_is_not_trained_or_is_called_passes_and_keeps_no_hooks(make, tmp_path, request):
    model = make()
    compiles = "compiled" in request.node.name
    check(model, compiles, gradients=lambda: model(input_ids=torch.arange(5, 13)[None]).logits.sum())
    assert hooks_of(model) == 0


def check(model: nn.Module, compiles: bool = False, gradients=None, args=ALONE, averages: bool = False) -> None:
    """One step under the callback, without a Trainer."""
    args = SimpleNamespace(**{**vars(args), "torch_compile": compiles})
    callback = UncalledLayers()
    callback.on_train_begin(args, None, None, model=model)
    callback.on_step_begin(args, None, None)
    gradients().backward()
    if averages:
        average_gradients(model)
    callback.on_pre_optimizer_step(args, None, None)


def average_gradients(model: nn.Module) -> None:
    """As DDP does: a parameter that one process used has a gradient on all of them."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)


class _OwnProducts(QuantExperts):
    """Experts that index their parameters."""

    def forward(self, hidden_states, top_k_index=None, top_k_weights=None):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate, up = F.linear(x, self.gate_up_proj[0]).chunk(2, -1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[0]).view(hidden_states.shape)


def test_experts_whose_parameters_are_read_directly_are_named_once():
    model = prepare_qat(make_mixture(), {"torch.nn.Linear": "MXFP4"}, ["lm_head", "*.gate"])
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = type("Own", (_OwnProducts, type(layer.mlp.experts)), {})
    with pytest.raises(UserError, match=r"--ignore 'model\.layers\.\*\.mlp\.experts' \("):
        check(model, gradients=lambda: model(input_ids=torch.arange(5, 13)[None]).logits.sum())


def test_a_weight_that_is_called_by_the_name_of_another_layer_passes():
    tied = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in "ab"})
    tied["b"].weight = tied["a"].weight
    prepare_qat(tied, {"a": "MXFP4", "b": "MXFP4"}, ())
    check(tied, gradients=lambda: tied["a"](torch.ones(1, 32)).sum())


# ---- Several processes ----


class _Routed(nn.Module):
    """Two layers: each process calls one of them; `bypassed` is called by none."""

    def __init__(self, bypasses: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))
        self.bypassed, self.bypasses = nn.Linear(32, 32, bias=False), bypasses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.experts[dist.get_rank()](x)
        return F.linear(x, self.bypassed.weight) if self.bypasses else self.bypassed(x)


def _train_step(wrapping: str, bypasses: bool, store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = prepare_qat(_Routed(bypasses), {"torch.nn.Linear": "MXFP4"}, ())
    args = SimpleNamespace(torch_compile=False, world_size=2, device=torch.device("cpu"))
    message = ""
    wrapped = model
    if wrapping == "fsdp1":
        import fsdp_on_cpu

        fsdp_on_cpu.enable()
        wrapped = model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif wrapping == "fsdp2":
        wrapped = fully_shard(model)
    try:
        check(
            model,
            gradients=lambda: wrapped(torch.ones(4, 32)).square().sum(),
            args=args,
            averages=wrapping == "averaged",
        )
    except UserError as error:
        message = str(error)
    dist.destroy_process_group()
    assert ("--ignore 'bypassed' " in message) == bypasses == bool(message), message


@pytest.mark.parametrize("wrapping", ["averaged", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("bypasses", [True, False])
def test_processes_agree_and_a_layer_that_another_process_called_passes(wrapping, bypasses, tmp_path):
    processes = [fork(_train_step, wrapping, bypasses, str(tmp_path / "store"), rank) for rank in range(2)]
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
