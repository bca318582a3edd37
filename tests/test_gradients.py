"""Gradients through quantizers: the clipped estimator and learned exponents, against plain autograd and by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat import TensorQuantizer, convert, get_scheme, ops, prepare_qat, reference
from qat.formats import FORMATS, can_saturate
from qat.schemes import INPUT_SCALE_RULES, SCALE_RULES, with_gradient_estimators

SCHEMES = pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4_RCEIL"])


def make_layer(scheme="MXFP4", weight="clipped_ste", input="clipped_ste", learn_exponent=False, rules=(None, None)):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer = convert(layer, with_gradient_estimators(get_scheme(scheme, *rules), weight, input), "layer", learn_exponent)
    if learn_exponent:
        with torch.no_grad():  # offsets that round to -2, -1, 0 and 1
            layer.weight_quantizer.exponent_offset.copy_(torch.linspace(-2, 1.4, 96).view(48, 2))
    return layer


def outliers(*shape: int) -> torch.Tensor:
    """Values of which some saturate in either format: block maxima in the last eighth of a binade."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., ::32] = 7.9
    x[..., 5::32] = -7.3
    return x


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def plain_fake_quantize(x, spec, dtype, offset=None):
    """Fake quantization as anybody would write it: a division, a rounding, a clamp, in plain autograd."""
    view, fmt = x.to(dtype), FORMATS[spec.format_name]
    exponent = reference.quantize(view.detach(), fmt, spec.scale_rule)[1].double() - 127
    if offset is not None:
        exponent = exponent + RoundStraightThrough.apply(offset.double())
    scaled = view.double().unflatten(-1, (-1, 32)) / 2 ** exponent[..., None]
    inside = scaled.detach().abs() <= fmt.max_normal
    # Rounding relative to the power of two below, floored at the smallest normal; ties to even, by torch.round.
    step = 2 ** (scaled.detach().abs().clamp(min=1e-30).log2().floor().clamp(min=fmt.emin) - fmt.mantissa_bits)
    rounded = RoundStraightThrough.apply(scaled / step) * step
    limited = torch.where(inside, rounded, scaled.detach().sign() * fmt.max_normal)
    values = (limited.clamp(-fmt.max_normal, fmt.max_normal) * 2 ** exponent[..., None]).flatten(-2)
    return values.to(dtype)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_a_rule_saturates_only_where_it_is_said_to(fmt, rule):
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.linspace(1, 2, 256)[:, None].expand(256, 1)[:, 0] * 64  # every mantissa as block maximum
    mask = reference.unpack_mask(reference.saturation_mask(x, reference.quantize(x, fmt, rule)[1], fmt))
    assert bool(mask.any()) == can_saturate(fmt, rule)


def test_saturation_is_counted_bit_by_bit():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.9, 6.0, -6.5, 5.9])  # FLOOR: the scale is 1, the largest element 6
    packed, scale = ops.quantize(x, "mxfp4", "floor", torch.float32)
    assert ops.saturation_mask(x, scale, "mxfp4", torch.float32).tolist() == [[0b0101, 0, 0, 0]]


@SCHEMES
@pytest.mark.parametrize("estimators", [("clipped_ste", "ste"), ("ste", "clipped_ste"), ("clipped_ste", "clipped_ste")])
@pytest.mark.parametrize("autocast", [False, True])
def test_clipped_gradients_equal_plain_autograd_bit_for_bit(scheme, estimators, autocast):
    layer = make_layer(scheme, *estimators)
    with torch.no_grad():
        layer.weight.copy_(outliers(48, 64) / 64)
    dtype, gradients = torch.bfloat16 if autocast else torch.float32, []

    def operand(x, spec):
        if spec.gradient_estimator == "clipped_ste":
            return plain_fake_quantize(x, spec, dtype)
        return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)

    def plain(x):
        weight = operand(layer.weight, layer.scheme.weight)
        return F.linear(operand(x, layer.scheme.input), weight, layer.bias.to(dtype))

    for forward in (layer, plain):
        x = outliers(3, 5, 64).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        gradients.append([y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*gradients, strict=True))
    zeros = [int((g == 0).sum()) for g in gradients[0][1:3]]
    clips = [layer.scheme.input.clips_gradients, layer.scheme.weight.clips_gradients]
    assert [count > 0 for count in zeros] == clips


@pytest.mark.parametrize("scheme,rules", [("MXFP4", ("search", "even")), ("MXFP8", (None, None))])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_learned_exponents_equal_plain_autograd(scheme, rules, fused):
    layer = make_layer(scheme, learn_exponent=True, rules=rules)
    offset, x = layer.weight_quantizer.exponent_offset, torch.randn(7, 64)
    if not fused:
        layer.input_quantizer.disable()
    grad = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    actual = torch.autograd.grad(y, [layer.weight, offset], grad)
    values = layer.input_quantizer(x)
    expected_y = F.linear(
        values, plain_fake_quantize(layer.weight, layer.scheme.weight, torch.float32, offset), layer.bias
    )
    expected = torch.autograd.grad(expected_y, [layer.weight, offset], grad)
    assert torch.equal(y, expected_y) and torch.equal(actual[0], expected[0])
    scale = 1 / math.sqrt(32 * FORMATS[layer.scheme.weight.format_name].max_normal)
    torch.testing.assert_close(actual[1], expected[1] * scale, rtol=1e-4, atol=1e-6)
    assert actual[1].dtype == torch.float32 and (actual[1] != 0).all()


def test_the_gradient_of_an_exponent_by_hand():
    quantizer = TensorQuantizer(bits=4, learn_exponent=True, scale_shape=(1, 32))
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([7.0, 1.2, -2.6])  # FLOOR: scale 1, elements 6 (saturated), 1 and -3
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0] + [0.0] * 29]))
    slope = 1.0 * 6 + 10.0 * (1 - 1.2) + 100.0 * (-3 + 2.6)
    expected = math.log(2) * slope / math.sqrt(32 * 6)
    assert quantizer.exponent_offset.grad.item() == pytest.approx(expected, rel=1e-5)


def test_offsets_move_the_scale_and_stay_within_what_e8m0_holds():
    quantizer = TensorQuantizer(bits=4, learn_exponent=True, scale_shape=(5, 32))
    weight = torch.full((5, 32), 4.0)  # FLOOR: biased exponent 127
    with torch.no_grad():
        quantizer.exponent_offset.copy_(torch.tensor([[0.4], [0.6], [-1.2], [-1000.0], [1000.0]]))
    quantizer(weight)
    assert quantizer.scale.flatten().tolist() == [127, 128, 126, 0, 254]
    assert quantizer(weight)[:, 0].tolist() == [4.0, 4.0, 3.0, 6 * 2.0**-127, 0.0]


@pytest.mark.parametrize("learn_exponent", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant, learn_exponent):
    layer, gradients = make_layer(learn_exponent=learn_exponent), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x = outliers(6, 64).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *[p.grad.clone() for p in layer.parameters()]])
    assert len(gradients[0]) == 3 + learn_exponent
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fullgraph_compilation_gives_the_same_loss_and_gradients():
    layer, results = make_layer(learn_exponent=True), []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = outliers(6, 64).requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *[p.grad.clone() for p in layer.parameters()]])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


def test_clipping_keeps_one_more_bit_for_each_input_value():
    layer, saved = make_layer(), []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    kept = [t for t in saved if t is not layer.weight]
    assert {t.dtype for t in kept} == {torch.uint8}
    assert sum(t.nbytes for t in kept) * 8 == 10 * 64 * (4.25 + 1)


@pytest.mark.parametrize("rule", INPUT_SCALE_RULES)
def test_where_nothing_saturates_no_mask_is_made(monkeypatch, rule):
    made, operator = [], ops.saturation_mask
    monkeypatch.setattr(ops, "saturation_mask", lambda *args: made.append(1) or operator(*args))
    layer = make_layer("MXFP8", rules=(rule, rule))
    layer(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert len(made) == (2 if rule == "floor" else 0)
    plain = make_layer("MXFP4", weight="ste", input="ste")
    plain(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert len(made) == (2 if rule == "floor" else 0)


def test_a_moved_exponent_is_never_served_from_the_cache():
    layer, x = make_layer(learn_exponent=True), torch.randn(4, 64)
    with torch.no_grad():
        before = layer(x)
        layer.weight_quantizer.exponent_offset.add_(1)
        after = layer(x)
    twin = copy.deepcopy(layer)
    assert not torch.equal(after, before) and torch.equal(after, twin(x))


def test_a_frozen_weight_can_still_learn_its_exponents():
    layer = make_layer(learn_exponent=True)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 64)).square().sum().backward()
    assert layer.weight.grad is None and layer.weight_quantizer.exponent_offset.grad.abs().sum() > 0


def test_a_weight_shared_with_the_embedding_learns_no_exponents():
    model = make_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        prepare_qat(model, {nn.Linear: "MXFP4"}, ignore=(), learn_exponent=True)
    assert type(model.lm_head) is nn.Linear
    settings = prepare_qat(model, {nn.Linear: "MXFP4"}, learn_exponent=True, input_gradient_estimator="clipped_ste")
    assert settings.qat_config.training == {"input_gradient_estimator": "clipped_ste", "learn_exponent": True}
