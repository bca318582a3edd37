"""Layers with adapters: they compute with the rounded merged weight, and their gradients need no second one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import Shapes, make_llama
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from qat import SCHEMES, convert, get_scheme, prepare_qat
from qat.errors import UserError
from qat.layers.adapted import AdaptedConv1D, AdaptedFalconLinear, AdaptedLinear, attach
from qat.layers.calibration import calibrate_inputs
from qat.layers.conv1d import convert_conv1d
from qat.layers.lora import MergedRounding, adapter_of, adapters, adapters_at_start, merged
from qat.layers.sites import quantizers_off
from qat.numerics import low_rank, ops

OUT, IN, RANK = 48, 128, 4
CLASSES = {"linear": nn.Linear, "conv1d": Conv1D, "falcon": FalconLinear}
SOME = ("MXFP4", "NVFP4", "INT4_G32", "FP8", "MXFP4A16")  # of each family one


def make_layer(kind: str = "linear", dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Module:
    """A layer of random weights, frozen or not."""
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if kind == "conv1d" else CLASSES[kind](IN, OUT, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def quantize(layer: nn.Module, scheme: str | None) -> nn.Module:
    """The layer prepared for a scheme; with a calibrated input where it needs one."""
    if scheme is None:
        return layer
    layer = (convert_conv1d if isinstance(layer, Conv1D) else convert)(layer, get_scheme(scheme), "layer")
    if layer.input_quantizer.needs_divisor:
        layer.input_quantizer.divisor = torch.tensor([1234.5])
    return layer


def make_factors(rows: int = OUT, columns: int = IN, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, as large as the weights together."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rank, columns, generator=generator) * 0.3, torch.randn(rows, rank, generator=generator) * 0.3


def make_adapted(scheme: str | None, kind: str = "linear", **kwargs) -> nn.Module:
    return attach(quantize(make_layer(kind, **kwargs), scheme), *make_factors(), 0.75)


def make_merged(scheme: str | None, kind: str = "linear", **kwargs) -> nn.Module:
    """The layer whose weight is merged first, then prepared."""
    layer = make_layer(kind, **kwargs)
    rows = layer.weight.data.t() if kind == "conv1d" else layer.weight.data
    rows.copy_(low_rank.merge(rows, *make_factors(), 0.75))
    return quantize(layer, scheme)


def run(layer: nn.Module, autocast: bool, dtype: torch.dtype = torch.bfloat16, seed: int = 2):
    """Input, output, and the gradients of the input and of all parameters that are trained, by name."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, IN, generator=generator).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradient = torch.randn(y.shape, generator=generator).to(y.dtype)
    own, *others = torch.autograd.grad(y, [x, *trained.values()], gradient)
    return y, own, dict(zip(trained, others, strict=True))


# ---- Merged equality ----


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("kind", CLASSES)
def test_an_adapted_layer_computes_what_the_merged_layer_computes_bit_for_bit(scheme, kind):
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32)):
        adapted, plain = (make(scheme, kind, dtype=dtype) for make in (make_adapted, make_merged))
        (y, grad, _), (expected, expected_grad, _) = (run(layer, autocast, dtype) for layer in (adapted, plain))
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        assert grad.dtype == expected_grad.dtype and torch.equal(grad, expected_grad)
        assert torch.equal(adapted.effective_weight(), plain.weight)


@pytest.mark.parametrize("kind", CLASSES)
def test_with_its_quantizers_off_it_is_the_merged_layer_of_the_library(kind):
    adapted, plain = make_adapted("MXFP4", kind), make_merged(None, kind)
    with quantizers_off(adapted):
        assert torch.equal(run(adapted, True)[0], run(plain, True)[0])


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "MXFP4A16"])
def test_an_adapted_model_computes_what_the_merged_model_computes(scheme):
    ids, logits = torch.arange(40).view(2, 20), []
    for merges_first in (False, True):
        model = make_llama(attention_bias=True).bfloat16()
        if not merges_first:
            prepare_qat(model, {nn.Linear: scheme})
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                factors = make_factors(module.out_features, module.in_features)
                if merges_first:
                    module.weight.data = low_rank.merge(module.weight.data, *factors, 0.5)
                else:
                    attach(module, *factors, 0.5, name)
        if merges_first:
            prepare_qat(model, {nn.Linear: scheme})
        calibrate_inputs(model, [{"input_ids": ids}])
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_layers_that_engines_fuse_share_the_divisor_of_the_largest_merged_weight():
    model = prepare_qat(make_llama(layers=1).bfloat16(), {nn.Linear: "NVFP4A16"})
    attention, x = model.model.layers[0].self_attn, torch.randn(3, 64).bfloat16()
    before = attention.q_proj(x)
    key = attach(attention.k_proj, *make_factors(32, 64), 1.0)
    key.adapter.lora_B.data.mul_(100)
    largest = key.effective_weight().abs().max()
    divisor = (448 * 6 / largest.float()).reshape(1)
    rule = attention.q_proj.weight_quantizer.spec.rule
    expected = F.linear(x, ops.fake_quantize(attention.q_proj.weight, "nvfp4", rule, x.dtype, divisor))
    assert torch.equal(attention.q_proj(x), expected) and not torch.equal(before, expected)


def test_a_step_of_the_optimizer_reaches_the_next_product_of_the_same_input():
    """Nothing of an earlier merge is kept: neither the rounded weight nor the divisor."""
    layer, x = make_adapted("NVFP4A16"), torch.randn(4, IN).bfloat16()
    layer(x)
    with torch.no_grad():
        layer.adapter.lora_B.mul_(3)
    fresh = copy.deepcopy(layer)
    assert torch.equal(layer(x), fresh(x.clone()))


# ---- Gradients ----


def plain_composition(layer: nn.Module, x: torch.Tensor, a, b, dtype: torch.dtype, autocast: bool) -> torch.Tensor:
    """Fake-quantize, merge and linear as plain operators, with straight-through gradients by autograd."""
    weight = layer.weight.float() + layer.adapter.scaling * (b @ a)
    weight = weight + (layer.effective_weight().detach() - weight).detach()  # the value of the merge, its gradient
    spec_x, spec_w = layer.scheme.input, layer.scheme.weight
    if spec_x is not None:
        given = () if layer.input_quantizer.divisor is None else (layer.input_quantizer.divisor,)
        x = ops.fake_quantize(x, spec_x.format.name, spec_x.rule, dtype, *given)
    weight = ops.fake_quantize(weight, spec_w.format.name, spec_w.rule, dtype)
    return F.linear(x.to(dtype), weight, layer.bias.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_both_factors_are_those_of_the_plain_composition(scheme, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    layer = make_adapted(scheme, dtype=torch.float32)
    y, grad_x, grads = run(layer, autocast, torch.float32)
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    a, b = (p.detach().clone().requires_grad_() for p in layer.adapter.factors)
    expected_y = plain_composition(layer, x, a, b, dtype, autocast)
    generator = torch.Generator().manual_seed(2)
    torch.randn(3, 5, IN, generator=generator)
    gradient = torch.randn(y.shape, generator=generator).to(y.dtype)
    expected_x, *expected = torch.autograd.grad(expected_y, [x, a, b], gradient)
    assert torch.equal(y, expected_y) and torch.equal(grad_x, expected_x)
    # Products of three matrices in another order: FP32 loses a few last bits. BF16 rounds the inner product (8 bits,
    # as LoRA in BF16 does) where the composition rounds the gradient of the weight.
    tolerance = 1e-5 if not autocast else 2**-7
    for own, other, factor in zip(grads.values(), expected, ("A", "B"), strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() <= tolerance * other.norm(), factor


def test_the_factors_alone_are_trained():
    layer = make_adapted("MXFP4")
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["adapter.lora_A", "adapter.lora_B"]
    assert all(p.dtype == torch.float32 for p in layer.adapter.parameters())


def test_a_weight_that_is_trained_beside_its_adapter_gets_its_gradient():
    layer, plain = make_adapted("MXFP4"), make_merged("MXFP4")
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(True)
    (_, _, own), (_, _, expected) = run(layer, True), run(plain, True)
    assert torch.equal(own["weight"], expected["weight"]) and torch.equal(own["bias"], expected["bias"])


def test_one_factor_alone_can_be_trained():
    layer = make_adapted("MXFP4")
    both = run(layer, True)[2]
    layer.adapter.lora_A.requires_grad_(False)
    ((name, own),) = run(layer, True)[2].items()
    assert name == "adapter.lora_B" and torch.equal(own, both[name])


def test_a_merged_weight_by_itself_has_gradients_of_both_factors():
    layer = make_adapted(None, dtype=torch.float32)
    a, b = layer.adapter.factors
    gradient = torch.randn(OUT, IN)
    own = torch.autograd.grad(merged(layer.weight, layer.adapter), [a, b], gradient)
    expected = torch.autograd.grad(layer.weight + 0.75 * (b @ a), [a, b], gradient)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SOME)
def test_checkpointing_changes_no_bit(scheme):
    layer = make_adapted(scheme)
    y, grad, grads = run(layer, True)
    other = run_checkpointed(layer)
    assert torch.equal(y, other[0]) and torch.equal(grad, other[1])
    assert all(torch.equal(grads[name], other[2][name]) for name in grads)


def run_checkpointed(layer: nn.Module):
    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=False)

        def named_parameters(self, *args, **kwargs):
            return layer.named_parameters(*args, **kwargs)

    return run(Checkpointed(), True)


# ---- What exists for backward ----


@pytest.mark.parametrize("scheme", [None, *SOME])
def test_backward_keeps_parameters_themselves_and_the_codes_of_the_input(scheme):
    layer, saved = make_adapted(scheme), []
    x = torch.randn(10, IN).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = [layer.weight, layer.adapter.lora_A, layer.adapter.lora_B]
    assert all(any(t is p for t in saved) for p in parameters)  # FSDP gathers these again; a view or copy it would not
    others = [t for t in saved if not any(t is p for p in parameters)]
    spec = None if scheme is None else layer.scheme.input
    if spec is None:
        assert {t.data_ptr() for t in others} == {x.data_ptr()}
    else:
        quantized = ops.quantize(x.detach(), spec.format.name, spec.rule, x.dtype, layer.input_quantizer.divisor)
        assert sum(t.nbytes for t in others) == quantized.nbytes


def test_backward_makes_no_gradient_of_the_shape_of_the_weight():
    layer, x = make_adapted("MXFP4"), torch.randn(10, IN).bfloat16()  # x needs no gradient: no rounded weight either
    y = layer(x)
    with Shapes() as shapes:
        y.backward(torch.ones_like(y))
    assert layer.adapter.lora_A.grad is not None and layer.weight.grad is None
    assert (RANK, IN) in shapes.seen and not {(OUT, IN), (IN, OUT)} & shapes.seen


def test_a_second_derivative_is_refused_not_wrong():
    layer, x = make_adapted("MXFP4"), torch.randn(4, IN).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.adapter.lora_B, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# ---- At the start ----


def test_at_the_start_nothing_is_added_where_b_was_zero():
    a, _ = make_factors()
    for scheme in (None, "MXFP4"):
        layer = attach(quantize(make_layer(), scheme), a, torch.zeros(OUT, RANK), 0.75)
        untouched = quantize(make_layer(), scheme)
        layer.adapter.lora_B.data.fill_(1.0)
        with adapters_at_start(layer):
            assert adapter_of(layer) is None
            assert torch.equal(run_without_gradient(layer), run_without_gradient(untouched))
        assert not torch.equal(run_without_gradient(layer), run_without_gradient(untouched))


def test_at_the_start_is_what_was_remembered():
    layer, expected = make_adapted("NVFP4A16"), make_merged("NVFP4A16")
    layer.adapter.remember_start()
    for factor in layer.adapter.factors:
        factor.data.add_(1.0)
    changed = run_without_gradient(layer)
    with adapters_at_start(layer):
        assert torch.equal(run_without_gradient(layer), run_without_gradient(expected))
    assert torch.equal(run_without_gradient(layer), changed)
    assert not any("start" in name for name in layer.state_dict())


def test_the_start_ends_with_an_error_too():
    layer = make_adapted("MXFP4")
    with pytest.raises(KeyError), adapters_at_start(layer):
        raise KeyError
    assert adapter_of(layer) is not None


def run_without_gradient(layer: nn.Module) -> torch.Tensor:
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(9)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return layer(x)


# ---- The layer as a module ----


def test_names_in_the_state_dict_are_those_of_the_layer_and_two_more():
    for scheme in (None, "MXFP4"):
        assert [*make_adapted(scheme).state_dict()] == ["weight", "bias", "adapter.lora_A", "adapter.lora_B"]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("scheme", [None, "MXFP4"])
def test_layers_can_be_copied_and_pickled(scheme, kind):
    layer = make_adapted(scheme, kind)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and twin.adapter.lora_A is not layer.adapter.lora_A
        assert torch.equal(run_without_gradient(twin), run_without_gradient(layer))


def test_layers_keep_the_classes_that_others_look_for():
    classes = {"linear": AdaptedLinear, "conv1d": AdaptedConv1D, "falcon": AdaptedFalconLinear}
    for kind, own in classes.items():
        layer = make_adapted(None, kind)
        assert isinstance(layer, own) and isinstance(layer, CLASSES[kind])
        assert list(adapters(nn.Sequential(layer))) == ["0"]


@pytest.mark.parametrize("scheme", [None, "MXFP4", "NVFP4"])
def test_layers_live_on_the_meta_device(scheme):
    with torch.device("meta"):
        layer = quantize(nn.Linear(IN, OUT), scheme)
        layer = attach(layer, torch.empty(RANK, IN), torch.empty(OUT, RANK), 4 / 3)
        y = layer(torch.empty(2, 3, IN))
    assert y.shape == (2, 3, OUT) and y.is_meta
    assert layer.adapter.scaling == torch.tensor(4 / 3).item()


@pytest.mark.parametrize("scheme", [None, "MXFP4", "NVFP4"])
def test_a_compiled_layer_computes_the_same(scheme):
    layer = make_adapted(scheme)
    expected, compiled = run(layer, True), torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, grad, grads = run(compiled, True)
    assert torch.equal(y, expected[0]) and torch.equal(grad, expected[1])
    assert all(map(torch.equal, grads.values(), expected[2].values()))


def test_scales_that_a_layer_keeps_are_those_of_the_merged_weight():
    adapted, plain = make_adapted("MXFP4"), make_merged("MXFP4")
    for layer in (adapted, plain):
        layer.weight_quantizer.register_buffer("scale", torch.zeros(OUT, IN // 32, dtype=torch.uint8))
    (y, grad, grads), (expected, expected_grad, _) = run(adapted, True), run(plain, True)
    assert torch.equal(y, expected) and torch.equal(grad, expected_grad)
    assert torch.equal(adapted.weight_quantizer.scale, plain.weight_quantizer.scale)
    fused = run(make_adapted("MXFP4"), True)[2]
    for name, own in grads.items():
        assert (own - fused[name]).norm() <= 2**-6 * own.norm()  # by the gradient of the weight, in BF16


# ---- Refused ----


def test_a_layer_that_learns_its_scales_is_refused():
    layer = convert(nn.Linear(IN, OUT), get_scheme("MXFP4"), "layer", learns=True)
    with pytest.raises(UserError, match="q_proj learns the scales of its weight.*--learn_exponent.*--lora_r"):
        attach(layer, *make_factors(), 1.0, "q_proj")


def test_a_second_adapter_is_refused():
    with pytest.raises(UserError, match="q_proj has an adapter already"):
        attach(make_adapted("MXFP4"), *make_factors(), 1.0, "q_proj")


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(UserError, match="embed is a Embedding; adapters are for linear layers.*--lora_target"):
        attach(nn.Embedding(8, IN), *make_factors(8), 1.0, "embed")


def test_factors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="does not belong to"):
        attach(make_layer(), *reversed(make_factors()), 1.0)


def test_adapters_have_no_part_in_rounding_without_a_scheme():
    layer = make_adapted(None)
    rounding = MergedRounding(None, layer.adapter.scaling)
    values = rounding.values(layer.weight, torch.float32, *layer.adapter.factors)
    assert torch.equal(values, layer.effective_weight().float())
