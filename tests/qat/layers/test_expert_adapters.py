"""Adapters of experts in fused parameters: an A and a B for each expert, merged before the weights are rounded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import Shapes
from tiny_experts import CHOSEN, COUNT, HIDDEN, INNER, GptOss, Llama4TextExperts, Model, Plain, Transposed, Ungated
from torch import nn

from qat import prepare_qat
from qat.errors import UserError
from qat.layers import expert_function
from qat.layers.adapted import attach_to_experts
from qat.layers.calibration import calibrate_inputs
from qat.layers.experts import compute_in_autocast_dtype, layout_of
from qat.layers.lora import adapters, adapters_at_start, weight_name
from qat.layers.sites import quantizers_off
from qat.numerics import low_rank, ops

RANK = 8
KINDS = pytest.mark.parametrize("kind", [Plain, Ungated, Transposed, GptOss])
SCHEMES = ("MXFP4", "MXFP8", "MXFP4A16", "MXFP4FP8", "INT4_G32", "FP8", "NVFP4", "NVFP4A16")


def make_model(kind, scheme: str | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Experts, prepared for a scheme."""
    model = Model(kind).to(dtype)
    model = compute_in_autocast_dtype(model) if scheme is None else prepare_qat(model, {nn.Linear: scheme}, ())
    x, index, weights = inputs(dtype)
    calibrate_inputs(model, [{"x": x.detach(), "index": index, "weights": weights.detach()}])
    return model


def make_factors(model, parameter: str, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    layout = layout_of(model.experts)
    _, rows, columns = layout.rows(getattr(model.experts, parameter)).shape
    generator = torch.Generator().manual_seed(len(parameter))
    shapes = (COUNT, rank, columns), (COUNT, rows, rank)
    return tuple(torch.randn(shape, generator=generator) * 0.2 for shape in shapes)


def make_adapted(kind, scheme: str | None = None, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> nn.Module:
    model = make_model(kind, scheme, dtype)
    for parameter in layout_of(model.experts).parameters:
        attach_to_experts(model.experts, parameter, *make_factors(model, parameter, rank), 0.75)
    return model


def make_merged(kind, scheme: str | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model whose weights are merged expert by expert, then prepared."""
    model = Model(kind).to(dtype)
    layout = layout_of(model.experts)
    for parameter in layout.parameters:
        a, b = make_factors(model, parameter)
        rows = layout.rows(getattr(model.experts, parameter).data)
        for e in range(COUNT):
            rows[e] = low_rank.merge(rows[e], a[e], b[e], 0.75)
    model.experts.requires_grad_(False)
    merged = compute_in_autocast_dtype(model) if scheme is None else prepare_qat(model, {nn.Linear: scheme}, ())
    x, index, weights = inputs(dtype)
    calibrate_inputs(merged, [{"x": x.detach(), "index": index, "weights": weights.detach()}])
    return merged


def inputs(dtype: torch.dtype = torch.bfloat16, tokens: int = 24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(COUNT, generator=generator)[:CHOSEN] for _ in range(tokens)])
    return x.requires_grad_(), index, torch.rand(tokens, CHOSEN, generator=generator).requires_grad_()


def copy_input_scales(model, other) -> None:
    """Calibration saw other weights before the first product's output; the tests compare what follows."""
    for name, projection in other.experts.projections.items():
        model.experts.projections[name].input_quantizer.divisor = projection.input_quantizer.divisor


def run(model, dtype: torch.dtype = torch.bfloat16, autocast: bool = True):
    """Output, and gradients of input, routing weights and what is trained, by name."""
    x, index, weights = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, index, weights)
    model.zero_grad()
    y.float().square().sum().backward()
    return y.detach(), x.grad, weights.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@KINDS
def test_adapted_experts_compute_what_the_merged_experts_compute_bit_for_bit(kind, scheme):
    adapted, merged = make_adapted(kind, scheme), make_merged(kind, scheme)
    if scheme is not None:
        copy_input_scales(adapted, merged)
    own, expected = run(adapted), run(merged)
    assert all(torch.equal(a, b) for a, b in zip(own[:3], expected[:3], strict=True))
    assert not expected[3] and len(own[3]) == 4
    for name, module in adapters(adapted).items():
        assert torch.equal(module.effective_weight(), merged.get_parameter(weight_name(name, module)))


@KINDS
def test_with_their_quantizers_off_they_are_the_merged_experts(kind):
    adapted, merged = make_adapted(kind, "MXFP4"), make_merged(kind)
    with quantizers_off(adapted):
        own, expected = run(adapted), run(merged)
    assert all(torch.equal(a, b) for a, b in zip(own[:3], expected[:3], strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16", None])
@pytest.mark.parametrize("rank", [3, RANK])  # of 3, rows are not aligned for grouped products
@pytest.mark.parametrize("kind", [Plain, Transposed])
def test_gradients_of_both_factors_follow_from_those_of_the_merged_weight(kind, rank, scheme, autocast):
    """dA = s B^T dW and dB = s dW A^T for each expert, with the dW that merged weights get."""
    adapted = make_adapted(kind, scheme, torch.float32, rank)
    merged = copy.deepcopy(adapted)
    layout = layout_of(merged.experts)
    for module in adapters(adapted).values():
        twin = merged.experts.projections[module.parameter]
        twin.weight.data = module.effective_weight().detach().contiguous()
        del twin._modules["adapter"]
    merged.experts.requires_grad_(True)
    own, expected = (run(model, torch.float32, autocast) for model in (adapted, merged))
    assert torch.equal(own[0], expected[0]) and torch.equal(own[1], expected[1])
    tolerance = 2**-6 if autocast else 1e-5  # BF16 rounds the inner product here, the gradient of the weight there
    for name, module in adapters(adapted).items():
        grad = layout.rows(expected[3][weight_name(name, module)])
        a, b = module.adapter.factors
        for factor, other in ((a, 0.75 * b.transpose(1, 2) @ grad), (b, 0.75 * grad @ a.transpose(1, 2))):
            assert factor.grad.dtype == torch.float32 and other.abs().max() > 0
            assert (factor.grad - other).norm() <= tolerance * other.norm()


def test_an_expert_that_no_token_reaches_gets_zero_gradients():
    model = make_adapted(Plain, "MXFP4")
    x, index, weights = inputs()
    index[index == 3] = 0
    model(x, index, weights).float().square().sum().backward()
    for module in adapters(model).values():
        for factor in module.adapter.factors:
            assert not factor.grad[3].any() and factor.grad[:3].abs().amax((1, 2)).min() > 0


def test_no_gradient_of_the_shape_of_the_weights_exists():
    model = make_adapted(Plain, "MXFP4", torch.float32)
    x, index, weights = inputs(torch.float32)
    y = model.experts._product("gate_up_proj", x.detach(), expert_function.Routing.of(index, COUNT)[0])
    with Shapes() as shapes:
        y.sum().backward()
    assert (COUNT, RANK, HIDDEN) in shapes.seen and (COUNT, 2 * INNER, HIDDEN) not in shapes.seen
    assert all(p.grad is None for name, p in model.named_parameters() if "adapter" not in name)


def test_backward_keeps_parameters_themselves_and_codes():
    model, saved = make_adapted(Plain, "MXFP4"), []
    x, index, _ = inputs()
    routing = expert_function.Routing.of(index, COUNT)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.experts._product("gate_up_proj", x, routing)
    parameters = [model.experts.gate_up_proj, *model.experts.projections["gate_up_proj"].adapter.factors]
    assert all(any(t is p for t in saved) for p in parameters)
    floating = [t for t in saved if t.is_floating_point() and not any(t is p for p in parameters)]
    assert not floating


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16"])
def test_rounding_a_few_experts_at_a_time_changes_nothing(scheme, monkeypatch):
    model = make_adapted(Transposed, scheme, torch.float32)
    whole = run(model, torch.float32, False)
    monkeypatch.setattr(expert_function, "CHUNK_BYTES", 3 * 4 * HIDDEN * INNER)  # one matrix, not two
    parts = run(model, torch.float32, False)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True))
    assert all(torch.equal(whole[3][name], parts[3][name]) for name in whole[3])


@pytest.mark.parametrize("scheme", [None, "MXFP4"])
def test_at_the_start_nothing_is_added_where_b_was_zero(scheme):
    model, untouched = make_adapted(Plain, scheme), make_model(Plain, scheme)
    with adapters_at_start(model):
        assert torch.equal(run(model)[0], run(untouched)[0])
    assert not torch.equal(run(model)[0], run(untouched)[0])


@pytest.mark.parametrize("scheme", [None, "MXFP4"])
def test_models_are_copied_and_pickled(scheme):
    model = make_adapted(GptOss, scheme)
    expected = run(model)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin)[0], expected)
        twin.experts.down_proj.data.zero_()
        assert not torch.equal(run(twin)[0], expected) and torch.equal(run(model)[0], expected)
    names = [f"experts.projections.{p}.adapter.lora_{f}" for p in ("gate_up_proj", "down_proj") for f in "AB"]
    assert sorted(name for name in model.state_dict() if "adapter" in name) == sorted(names)


def test_the_factors_alone_are_trained():
    model = make_adapted(GptOss, "MXFP4")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("adapter" in name for name in trained)


def test_rows_that_are_sorted_by_expert_need_no_router():
    model, twin = (make_adapted(kind, "MXFP4") for kind in (Llama4TextExperts, Transposed))
    x = inputs(tokens=6 * COUNT)[0].detach()
    index = torch.arange(COUNT).repeat_interleave(6)[:, None]
    assert torch.equal(model.experts(x), twin.experts(x, index, torch.ones(len(x), 1).bfloat16()))


def test_one_product_alone_can_have_adapters():
    model, merged = make_model(Plain), make_merged(Plain)
    attach_to_experts(model.experts, "down_proj", *make_factors(model, "down_proj"), 0.75)
    merged.experts.gate_up_proj.data.copy_(model.experts.gate_up_proj)
    assert torch.equal(run(model)[0], run(merged)[0])


def test_what_cannot_have_an_adapter_is_refused_by_name():
    model = make_adapted(Plain, "MXFP4")
    given = make_factors(model, "down_proj")
    with pytest.raises(UserError, match="m.down_proj has an adapter already"):
        attach_to_experts(model.experts, "down_proj", *given, 1.0, "m")
    with pytest.raises(UserError, match="m.router is no weight of experts.*--lora_target_parameters"):
        attach_to_experts(model.experts, "router", *given, 1.0, "m")
    with pytest.raises(ValueError, match="does not belong to"):
        attach_to_experts(make_model(Plain).experts, "gate_up_proj", *given, 1.0)
    learns = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, (), learn_exponent=True)
    with pytest.raises(UserError, match="learns the scales of its weight"):
        attach_to_experts(learns.experts, "down_proj", *given, 1.0)
    with pytest.raises(UserError, match="has adapters already; prepare a model for a scheme before"):
        prepare_qat(make_adapted(Plain), {nn.Linear: "MXFP4"}, ())


def test_the_divisor_is_that_of_each_experts_merged_weight():
    model = make_adapted(Plain, "NVFP4A16")
    projection = model.experts.projections["down_proj"]
    divisors = projection.divisors(projection.weight, torch.bfloat16, projection.adapter)
    for e, weight in enumerate(projection.effective_weight()):
        assert torch.equal(divisors[e : e + 1], ops.tensor_divisor([weight], "nvfp4", torch.bfloat16))
