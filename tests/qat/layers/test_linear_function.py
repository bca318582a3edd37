"""The fused quantized linear: exact gradients, little memory, an input cache that is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat import SCHEMES, convert, get_scheme, prepare_qat
from qat.layers.calibration import calibrate_inputs
from qat.numerics import ops
from qat.numerics.families import family_of

WEIGHT_ONLY = [name for name in SCHEMES if get_scheme(name).input is None]


def make_layer(scheme: str = "MXFP4", bias: bool = True, width: int = 64):
    torch.manual_seed(0)
    layer = convert(nn.Linear(width, 48, bias=bias), get_scheme(scheme), "layer")
    if layer.input_quantizer.needs_divisor:
        layer.input_quantizer.divisor = torch.tensor([1234.5])
    return layer


def plain(layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same computation as a composition of plain operators."""
    spec_x, spec_w, divisors = layer.scheme.input, layer.scheme.weight, ()
    values = x.to(dtype)
    if spec_x is not None:
        given = () if layer.input_quantizer.divisor is None else (layer.input_quantizer.divisor,)
        values = ops.fake_quantize(x, spec_x.format.name, spec_x.rule, dtype, *given)
    if spec_w.format.tensor_scale:
        largest = torch.stack([other.weight.abs().max() for other in layer.fused_with]).max().to(dtype).float()
        divisors = ((448 * 6 / largest).reshape(1).detach(),)
    weight = ops.fake_quantize(layer.weight, spec_w.format.name, spec_w.rule, dtype, *divisors)
    return torch.nn.functional.linear(values, weight, None if layer.bias is None else layer.bias.to(dtype))


class CountedOps:
    """How often each operator of `qat.ops` ran."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        for name in ("quantize", "dequantize", "fake_quantize", "tensor_divisor"):
            monkeypatch.setattr(ops, name, self._counting(name, getattr(ops, name)))

    def _counting(self, name, operator):
        def call(*args):
            self.calls.append(name)
            return operator(*args)

        return call


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_equal_the_plain_composition_bit_for_bit(scheme, autocast, bias):
    layer = make_layer(scheme, bias, width=128)
    dtype = torch.bfloat16 if autocast else torch.float32
    results = []
    for forward in (layer, lambda x: plain(layer, x, dtype)):
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x)
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, inputs, gradient)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_have_their_closed_form(scheme):
    """dL/dx = dy q(w) and dL/dw = dy^T q(x): straight through both roundings."""
    layer, x, gradient = make_layer(scheme, width=128), torch.randn(7, 128, requires_grad=True), torch.randn(7, 48)
    layer(x).backward(gradient)
    with torch.no_grad():
        weight = rounded_by_reference(layer.weight, layer.scheme.weight)
        inputs = rounded_by_reference(x, layer.scheme.input, layer.input_quantizer.divisor)
    torch.testing.assert_close(x.grad, gradient @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, gradient.t() @ inputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0))


def rounded_by_reference(x: torch.Tensor, spec, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """By the plain functions of the format's family, not by kernels."""
    given = () if divisor is None else (divisor,)
    return x if spec is None else family_of(spec.format).fake_quantize(x, spec.format, spec.rule, x.dtype, *given)


def test_the_divisor_of_fused_weights_is_computed_once_for_an_input(monkeypatch):
    model, counted = prepare_qat(make_llama(layers=1), {nn.Linear: "NVFP4A16"}), CountedOps(monkeypatch)
    model(torch.arange(20)[None])
    assert counted.calls.count("tensor_divisor") == 4  # q k v, o, gate up, down


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_layers_that_engines_fuse_share_the_divisor_of_the_largest_weight(scheme):
    model = prepare_qat(make_llama(layers=1), {nn.Linear: scheme})
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data *= 50
    ids = torch.arange(20)[None]
    calibrate_inputs(model, [{"input_ids": ids}])
    x = torch.randn(3, attention.q_proj.in_features)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert torch.equal(layer(x), plain(layer, x, torch.float32))
    alone = copy.deepcopy(attention.q_proj)
    alone.__dict__["fused_with"] = (alone,)
    assert not torch.equal(alone(x), attention.q_proj(x))


def test_backward_keeps_packed_codes_and_the_parameter_only():
    layer, saved = make_layer(), []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    codes = [t for t in saved if t is not layer.weight]
    assert any(t is layer.weight for t in saved)
    assert [(t.dtype, t.numel()) for t in codes] == [(torch.uint8, 10 * 64 // 2), (torch.uint8, 10 * 64 // 32)]


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_a_layer_with_quantized_weights_only_keeps_its_plain_input_without_a_copy(scheme):
    layer, saved = make_layer(scheme, width=128), []
    x = torch.randn(10, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved} == {layer.weight.data_ptr(), x.data_ptr()}


def test_nvfp4_keeps_four_and_a_half_bits_of_an_input():
    layer, saved = make_layer("NVFP4"), []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    divisor = layer.input_quantizer.divisor
    assert sum(t.nbytes for t in saved if t is not layer.weight and t is not divisor) == 10 * 64 * 4.5 / 8


def test_layers_that_share_an_input_quantize_it_once_and_save_it_once(monkeypatch):
    layers, counted, saved = [make_layer() for _ in range(3)], CountedOps(monkeypatch), []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = [layer(x) for layer in layers]
    # One quantize and one dequantize for x; each weight is rounded once.
    assert counted.calls.count("quantize") == 1 and counted.calls.count("dequantize") == 1
    assert counted.calls.count("fake_quantize") == 3
    assert len({t.data_ptr() for t in saved if t.dtype == torch.uint8}) == 2
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_an_input_changed_in_place_is_quantized_again():
    layer, x = make_layer(), torch.randn(4, 64)
    before = layer(x)
    x.mul_(3.0)
    assert torch.equal(layer(x), layer(x.clone())) and not torch.equal(layer(x), before)


def test_the_cached_input_dies_with_the_input():
    from qat.layers.linear_function import _inputs

    layer, x = make_layer(), torch.randn(4, 64)
    layer(x)
    assert _inputs.entry is not None
    del x
    assert _inputs.entry is None


def test_a_changed_weight_is_rounded_again_and_a_copy_has_its_own():
    layer, x = make_layer(), torch.randn(4, 64)
    before, twin = layer(x), copy.deepcopy(layer)
    layer.weight.data.neg_()
    assert torch.equal(layer(x), plain(layer, x, torch.float32)) and not torch.equal(layer(x), before)
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = nn.Sequential(nn.Linear(64, 64), *[nn.Sequential(make_layer(), nn.Linear(48, 64)) for _ in range(2)])
    gradients = []
    for checkpointed in (False, True):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        hidden = x
        for block in model:
            hidden = checkpoint(block, hidden, use_reentrant=use_reentrant) if checkpointed else block(hidden)
        model.zero_grad()
        hidden.square().sum().backward()
        gradients.append([x.grad, *[p.grad.clone() for p in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointed_llama_trains_as_without_checkpointing():
    losses = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}).train()
        if kwargs is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(40).reshape(2, 20)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_frozen_weights_keep_no_codes(monkeypatch):
    layer, counted = make_layer(bias=False), CountedOps(monkeypatch)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and "quantize" not in counted.calls  # the input needs values only


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "INT4_G32"])
def test_fullgraph_compilation_gives_the_same_loss_and_gradients(scheme):
    ids = torch.arange(40).reshape(2, 20)
    results = []
    for compiled in (False, True):
        model = prepare_qat(make_llama(layers=1), {nn.Linear: scheme})
        calibrate_inputs(model, [{"input_ids": ids}])
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters()]])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 64), (2, 4, 64)])
def test_a_model_may_change_an_output_in_place(shape):
    torch.manual_seed(0)
    layer, x = convert(nn.Linear(64, 32), get_scheme("MXFP4")), torch.randn(shape)
    expected = layer(x) + 1  # RoCBert adds embeddings so
    expected.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    output = layer(x)
    output += 1
    output.square().sum().backward()
    assert torch.equal(output, expected) and torch.equal(layer.weight.grad, gradient)
