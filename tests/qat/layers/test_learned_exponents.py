"""Learned exponents: values and gradients against plain autograd and by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat import TensorQuantizer, convert, get_scheme, prepare_qat
from qat.numerics import mx


def make_layer(scheme="MXFP4", rules=(None, None)):
    torch.manual_seed(0)
    layer = convert(nn.Linear(64, 48), get_scheme(scheme, *rules), "layer", learns=True)
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


def plain_fake_quantize(x, spec, dtype, offset):
    """Fake quantization as anybody would write it: a division, a rounding, a clamp, in plain autograd."""
    view, element = x.to(dtype), spec.format.element
    exponent = mx.quantize(view.detach(), spec.format, spec.rule).scales[0].double() - 127
    exponent = exponent + RoundStraightThrough.apply(offset.double())
    scaled = view.double().unflatten(-1, (-1, 32)) / 2 ** exponent[..., None]
    inside = scaled.detach().abs() <= element.largest
    # Rounding relative to the power of two below, floored at the smallest normal; ties to even, by torch.round.
    step = 2 ** (scaled.detach().abs().clamp(min=1e-30).log2().floor().clamp(min=element.emin) - element.mantissa_bits)
    rounded = RoundStraightThrough.apply(scaled / step) * step
    limited = torch.where(inside, rounded, scaled.detach().sign() * element.largest)
    values = (limited.clamp(-element.largest, element.largest) * 2 ** exponent[..., None]).flatten(-2)
    return values.to(dtype)


@pytest.mark.parametrize("scheme,rules", [("MXFP4", ("search", "even")), ("MXFP8", (None, None))])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_learned_exponents_equal_plain_autograd(scheme, rules, fused):
    layer = make_layer(scheme, rules)
    offset, x = layer.weight_quantizer.exponent_offset, torch.randn(7, 64)
    if not fused:
        layer.input_quantizer.disable()
    grad = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    actual = torch.autograd.grad(y, [layer.weight, offset], grad)
    values = layer.input_quantizer(x)
    quantized = plain_fake_quantize(layer.weight, layer.scheme.weight, torch.float32, offset)
    expected_y = F.linear(values, quantized, layer.bias)
    # Weights get the gradient straight through, also where they saturate.
    expected = torch.autograd.grad(expected_y, [quantized, offset], grad)
    assert torch.equal(y, expected_y) and torch.equal(actual[0], expected[0])
    scale = 1 / math.sqrt(32 * layer.scheme.weight.format.element.largest)
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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    layer, gradients = make_layer(), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x = outliers(6, 64).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *[p.grad.clone() for p in layer.parameters()]])
    assert len(gradients[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fullgraph_compilation_gives_the_same_loss_and_gradients():
    layer, results = make_layer(), []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = outliers(6, 64).requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *[p.grad.clone() for p in layer.parameters()]])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


def test_a_moved_exponent_changes_the_values_at_once():
    layer, x = make_layer(), torch.randn(4, 64)
    with torch.no_grad():
        before = layer(x)
        layer.weight_quantizer.exponent_offset.add_(1)
        after = layer(x)
    twin = copy.deepcopy(layer)
    assert not torch.equal(after, before) and torch.equal(after, twin(x))


def test_a_frozen_weight_can_still_learn_its_exponents():
    layer = make_layer()
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 64)).square().sum().backward()
    assert layer.weight.grad is None and layer.weight_quantizer.exponent_offset.grad.abs().sum() > 0


def test_a_weight_shared_with_the_embedding_learns_no_exponents():
    model = make_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        prepare_qat(model, {nn.Linear: "MXFP4"}, ignore=(), learn_exponent=True)
    assert type(model.lm_head) is nn.Linear
    settings = prepare_qat(model, {nn.Linear: "MXFP4"}, learn_exponent=True)
    assert settings.qat_config.training == {"learn_exponent": True}
