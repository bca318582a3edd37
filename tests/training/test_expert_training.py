"""What training does to fused experts as to linear layers: recomputed, compiled, optimized, saved and resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import make_mixture, make_tokenizer, write_conversations
from safetensors.torch import load_file
from torch import nn
from trainers import make_data, make_trainer
from transformers import Adafactor, AutoModelForCausalLM

import main
from qat import prepare_qat
from qat.errors import UserError
from qat.files.manifest import describe, write_manifest
from qat.layers.calibration import calibrate_inputs
from qat.layers.learned import optimizer_settings
from training.backends.fingerprint import fingerprint
from training.backends.saved_dtypes import SavedDtypes

KINDS = ("qwen3_moe", "gpt_oss")
IDS = torch.randint(2, 260, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def gradients(model: nn.Module, forward=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = (forward or model)(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- Recomputed ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_give_the_same_gradients(kind, reentrant):
    model = prepare_qat(make_mixture(kind), {nn.Linear: "MXFP4"}, learn_exponent=True).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert equal(gradients(model), expected)


# ---- Compiled ----


@pytest.mark.parametrize(
    ("kind", "scheme", "learns"),
    [
        ("qwen3_moe", "MXFP4", {}), ("gpt_oss", "NVFP4", {}), ("gpt_oss", "MXFP4", {"learn_exponent": True}),
        ("qwen3_moe", "INT4_G32", {"learn_scale": True}),
    ],
)  # fmt: skip
def test_a_sparse_layer_with_its_router_compiles_to_one_graph(kind, scheme, learns):
    model = prepare_qat(make_mixture(kind, layers=1), {nn.Linear: scheme}, **learns)
    if scheme == "NVFP4":
        calibrate_inputs(model, [{"input_ids": IDS}])
    layer = model.model.layers[0].mlp
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(x)
        y = output[0] if isinstance(output, tuple) else output
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for eager, own in zip(*results, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-5)


def run(folder, name: str, *flags: str) -> dict:
    main.main(
        [
            "--model_name_or_path", str(folder / "model"), "--dataset", str(folder / "data.jsonl"),
            "--data_cache_dir", str(folder / "cache"), "--output_dir", str(folder / name), "--eval_size", "6",
            "--quant_scheme", "MXFP4", "--do_train", "True", "--max_steps", "2", "--per_device_train_batch_size", "2",
            "--save_strategy", "no", "--export_format", "none", "--report_to", "none", "--report", "False", *flags,
        ]
    )  # fmt: skip
    return json.loads((folder / name / "all_results.json").read_text())


@pytest.fixture
def folder(tmp_path):
    model = make_mixture(layers=1, output_router_logits=True, router_aux_loss_coef=0.1)
    model.bfloat16().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    return tmp_path


def test_a_compiled_run_trains_the_same_model(folder):
    """The eager backend traces all and generates no code; breaks of the graph are where losses are computed."""
    plain = run(folder, "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(folder, "compiled", "--torch_compile", "True", "--torch_compile_backend", "eager")
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("torch.compiler.disable" in reason for reason in breaks)


# ---- Saved and resumed ----


def test_the_best_checkpoint_and_a_resumed_run_have_their_experts(tmp_path, data):
    """transformers would save them split, and load none of them."""
    flags = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    flags |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_strategy": "steps"}
    trained = []
    for name, more in {"whole": {}, "resumed": {}, "best": {"load_best_model_at_end": True}}.items():
        model = prepare_qat(make_mixture(), {nn.Linear: "MXFP4"}, learn_exponent=True)
        trainer = make_trainer(tmp_path / name, model, data, None, **flags | more)
        source = tmp_path / "whole" / "out" / "checkpoint-2"
        trainer.train(resume_from_checkpoint=str(source) if name == "resumed" else None)
        trained.append({key: value.clone() for key, value in model.state_dict().items()})
    whole, resumed, best = trained
    assert equal(whole, resumed)
    saved = load_file(tmp_path / "best" / "out" / f"checkpoint-{trainer.state.best_global_step}" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in best.items() if key in saved)
    assert {key for key in best if key not in saved} <= {"lm_head.weight"}
    untrained = make_mixture().state_dict()
    assert not any(torch.equal(best[key], untrained[key]) for key in untrained if "experts" in key)


def test_a_checkpoint_that_lacks_experts_is_refused(tmp_path, data):
    flags = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    make_trainer(tmp_path, make_mixture(), data, None, **flags).train()
    split = tmp_path / "split"
    shutil.copytree(tmp_path / "out" / "checkpoint-1", split / "checkpoint-1")
    make_mixture().save_pretrained(split / "checkpoint-1")  # as an earlier version did
    (split / "checkpoint-1" / "manifest.json").unlink()
    write_manifest(split / "checkpoint-1", describe(split / "checkpoint-1"))
    trainer = make_trainer(tmp_path, make_mixture(), data, None, **flags)
    lacks = (
        "it lacks model.layers.0.mlp.experts.down_proj, .* and 1 more and has in place of them .*experts.0.down_proj"
    )
    with pytest.raises(UserError, match=lacks):
        trainer.train(resume_from_checkpoint=str(split / "checkpoint-1"))


def test_a_finished_run_saves_each_tensor_in_its_dtype(tmp_path, data):
    model = make_mixture()
    dtypes = {name: torch.float32 if "gate.weight" in name else torch.bfloat16 for name in model.state_dict()}
    trainer = make_trainer(tmp_path, prepare_qat(model, {nn.Linear: "MXFP4"}), data, None)
    trainer.saved_dtypes = SavedDtypes(torch.bfloat16, dtypes)
    trainer.train()
    trainer.round_masters()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert saved["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_fingerprint_tells_apart_models_that_differ_in_their_experts():
    model, other = make_mixture(), make_mixture()
    assert fingerprint(model) == fingerprint(other) == fingerprint(prepare_qat(other, {nn.Linear: "MXFP4"}))
    other.model.layers[1].mlp.experts.down_proj.data += 1e-3
    assert fingerprint(model) != fingerprint(other)


# ---- Optimized ----


@pytest.mark.parametrize("kind", KINDS)
def test_experts_decay_and_neither_their_biases_nor_what_they_learn_do(tmp_path, data, kind):
    model = prepare_qat(make_mixture(kind), {nn.Linear: "MXFP4"}, learn_exponent=True)
    trainer = make_trainer(tmp_path, model, data, None, weight_decay=0.1)
    trainer.parameter_groups = optimizer_settings(exponents=0.3)
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters() if ".experts." in name}
    assert len(found) == (8 if kind == "qwen3_moe" else 12)
    for name, value in found.items():
        assert value == (0.0 if name.endswith(("_bias", "_offset")) else 0.1), name


def test_adafactor_factors_the_second_moments_of_each_expert():
    """A fused parameter is stepped as its matrices are, but for clipping: the norm is that of all experts."""
    weight = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "clip_threshold": 1e9}
    fused, single = nn.Parameter(weight.clone()), [nn.Parameter(own.clone()) for own in weight]
    optimizers = Adafactor([fused], **settings), Adafactor(single, **settings)
    for step in range(3):
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step + 1))
        grad[1] = 0  # no token
        fused.grad = grad.clone()
        for own, part in zip(single, grad, strict=True):
            own.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.stack([p.detach() for p in single]))
    assert torch.equal(fused[1], weight[1]) and not torch.equal(fused[0], weight[0])
