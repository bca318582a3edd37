"""Transformed inputs: compressed-tensors' own code gives the same bits, gradients are exact, mistakes are one line."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from helpers import make_llama, make_mixture
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat import QATConfig, convert, get_scheme, prepare_qat
from qat.errors import UserError
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import quantized_sites, quantizers_off
from qat.layers.transform import TransformedRounding, transformed_input, transformed_weight
from qat.layers.transformed import transformed_sites
from qat.numerics import ops
from qat.numerics.families import family_of
from qat.numerics.hadamard import matrix as hadamard
from qat.numerics.hadamard import transform

BOTH = {"*.down_proj": "hadamard", "*.o_proj": "hadamard"}


def by_the_library(linear: nn.Linear) -> nn.Module:
    """A model of one layer with both transforms of compressed-tensors: of its inputs, and folded into its weight."""
    model = nn.Sequential(linear)
    apply = [{"targets": ["Linear"], "location": place, "inverse": place != "input"}
             for place in ("input", "weight_input")]  # fmt: skip
    scheme = {"type": "hadamard", "head_dim": 32, "apply": apply}
    apply_transform_config(model, TransformConfig.model_validate({"config_groups": {"T": scheme}}))
    return model


def test_the_matrix_is_sylvester_s():
    assert torch.equal(hadamard(), deterministic_hadamard_matrix(32, torch.float32))
    assert torch.equal(hadamard() @ hadamard(), 32 * torch.eye(32))


def test_inputs_and_weights_are_transformed_as_compressed_tensors_does_bit_for_bit():
    torch.manual_seed(0)
    x, linear = torch.randn(3, 40, 96).bfloat16() * 9, nn.Linear(96, 64, bias=False).bfloat16()
    weight, seen = linear.weight.detach().clone(), []
    library = by_the_library(linear)
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    library(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformed_input(x), seen[0])
    assert torch.equal(transformed_weight(weight), linear.weight)


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4A16", "MXFP4FP8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_equals_its_plain_composition_in_values_and_gradients(scheme, autocast):
    torch.manual_seed(0)
    layer = convert(nn.Linear(64, 48), get_scheme(scheme), "layer")
    layer.weight_quantizer.is_transformed = True
    x, dtype = torch.randn(2, 5, 64, requires_grad=True), torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    t = torch.block_diag(hadamard(), hadamard()).double() / 32**0.5
    xt = (x.detach().to(dtype).double() @ t).to(dtype).requires_grad_()
    wt = (layer.weight.detach().to(dtype).double() @ t).bfloat16().to(dtype).requires_grad_()
    spec = layer.scheme.input
    xq = xt if spec is None else ops.fake_quantize(xt, spec.format.name, spec.rule, dtype)
    expected = xq @ ops.fake_quantize(wt, layer.scheme.weight.format.name, layer.scheme.weight.rule, dtype).t()
    expected = expected + layer.bias.to(dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    tolerance = {"rtol": 3e-2, "atol": 0.5} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(x.grad.double(), xt.grad.double() @ t, **tolerance)
    torch.testing.assert_close(layer.weight.grad.double(), wt.grad.double() @ t, **tolerance)


def rounded_and_transformed_back(x: torch.Tensor, spec, dtype: torch.dtype) -> torch.Tensor:
    """Q(x T) T by the plain functions, not by kernels; x itself if it is not rounded."""
    if spec is None:
        return x.to(dtype)
    fmt = spec.format
    values = family_of(fmt).fake_quantize(transform(x, torch.bfloat16).to(dtype), fmt, spec.rule, dtype)
    return transform(values, dtype)


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4A16", "MXFP4FP8"])
@pytest.mark.parametrize("in_fp8", [False, True])
def test_gradients_are_products_with_operands_in_the_plain_basis_bit_for_bit(scheme, in_fp8):
    torch.manual_seed(0)
    layer = convert(nn.Linear(64, 48), get_scheme(scheme), "layer")
    layer.weight_quantizer.is_transformed, layer.in_fp8 = True, in_fp8
    x, grad = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(grad)
    inputs = rounded_and_transformed_back(x.detach(), layer.scheme.input, torch.bfloat16)
    weight = rounded_and_transformed_back(layer.weight.detach(), layer.scheme.weight, torch.bfloat16)
    assert torch.equal(x.grad, (grad.view(10, 48) @ weight).view_as(x).float())
    assert torch.equal(layer.weight.grad, (grad.view(10, 48).t() @ inputs.view(10, 64)).float())


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4A16"])
def test_gradients_are_as_near_to_fp64_as_those_of_bf16_training(scheme):
    torch.manual_seed(0)
    quantized, plain = convert(nn.Linear(128, 96), get_scheme(scheme), "layer"), nn.Linear(128, 96)
    quantized.weight_quantizer.is_transformed = True
    x, grad = torch.randn(512, 128), torch.randn(512, 96).bfloat16()
    x[:, ::37] *= 40  # outliers
    x[torch.rand_like(x) < 1e-2] *= 10
    t, errors = torch.block_diag(*4 * [hadamard().double()]) / 32**0.5, []
    for layer, spec, its in ((plain, None, None), (quantized, quantized.scheme.input, quantized.scheme.weight)):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            layer(inputs).backward(grad)
        exact = []  # operands in FP64; quantized, those of the forward pass times T
        for operand, of in ((layer.weight.detach(), its), (x, spec)):
            exact.append(operand.double())
            if of is not None:
                seen = transform(operand, torch.bfloat16)
                exact[-1] = ops.fake_quantize(seen, of.format.name, of.rule, torch.bfloat16).double() @ t
        expected = grad.double() @ exact[0], grad.double().t() @ exact[1]
        found = inputs.grad, layer.weight.grad
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)])
    assert all(ours < 1.2 * theirs < 0.004 for theirs, ours in zip(*errors, strict=True))


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16", "MXFP4FP8"])
def test_backward_keeps_what_it_keeps_without_transforms(scheme):
    kept = []
    for is_transformed in (False, True):
        layer, saved = convert(nn.Linear(64, 48), get_scheme(scheme), "layer"), []
        layer.weight_quantizer.is_transformed = is_transformed
        x = torch.randn(10, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            layer(x)
        kept.append([(t.dtype, t.shape, t.data_ptr() in (x.data_ptr(), layer.weight.data_ptr())) for t in saved])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16"])
def test_layers_that_are_compiled_or_checkpointed_have_the_same_values_and_gradients(scheme):
    layers = [convert(nn.Linear(64, 48), get_scheme(scheme), "layer") for _ in range(3)]
    for layer in layers:
        layer.weight_quantizer.is_transformed = True
        layer.fuse_with(tuple(layers))

    def all_of(x):
        return torch.stack([layer(x) for layer in layers])

    found = []
    compiled = torch.compile(all_of, fullgraph=True, backend="aot_eager")
    for call in (all_of, compiled, lambda x: checkpoint(all_of, x, use_reentrant=False)):
        x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *(layer.weight for layer in layers)])])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    assert not torch.equal(found[0][1], found[0][1].bfloat16().float())  # the layers' gradients are summed in FP32


def test_a_quantizer_by_itself_gives_the_weight_the_same_gradient():
    layer = convert(nn.Linear(64, 48), get_scheme("MXFP4"), "layer")
    layer.weight_quantizer.is_transformed = True
    layer.weight_quantizer(layer.weight).square().sum().backward()
    values = layer.weight_quantizer(layer.weight.detach())
    t = torch.block_diag(hadamard(), hadamard()).double() / 32**0.5
    torch.testing.assert_close(layer.weight.grad.double(), 2 * values.double() @ t)


def test_rows_in_e4m3_hold_the_values_of_the_transformed_weight():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    rounding = TransformedRounding(get_scheme("MXFP4").weight)
    rows, values = rounding.rows(weight, torch.bfloat16), rounding.values(weight, torch.bfloat16)
    scale = rows.scale.float().reshape(-1, 1)
    assert rounding.gives_rows and torch.equal(rows.values.float() * scale, values.float())


def test_an_outlier_costs_its_block_less():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 20
    t = transformed_input(x)
    plain = ops.fake_quantize(x, "mxfp4", "even", torch.float32) - x
    ours = ops.fake_quantize(t, "mxfp4", "even", torch.float32) - t
    assert ours.norm() < plain.norm()


def test_without_quantizers_the_model_computes_what_it_computed():
    model, ids = make_llama().eval(), torch.arange(64)[None]
    before = model(input_ids=ids).logits
    prepare_qat(model, {nn.Linear: "MXFP4"}, input_transforms=BOTH)
    with quantizers_off(model):
        assert torch.equal(model(input_ids=ids).logits, before)
    for site in quantized_sites(model):
        site.module.weight_quantizer.disable()
        if site.scheme.input is not None and site.name.endswith(("down_proj", "o_proj")):
            continue
        site.module.input_quantizer.disable()
    assert not torch.equal(model(input_ids=ids).logits, before)  # transformed inputs alone are rounded


@pytest.mark.parametrize(("scheme", "verb"), [("MXFP4", "quantize"), ("MXFP4A16", "transform")])
def test_layers_that_share_an_input_share_what_is_made_of_it(scheme, verb, monkeypatch):
    model = prepare_qat(make_llama(layers=1), {nn.Linear: scheme}, input_transforms={"*": "hadamard"})
    operator, shapes = getattr(ops, verb), []

    def counting(x, *args):
        shapes.append(x.shape)
        return operator(x, *args)

    counting.function = getattr(operator, "function", None)
    monkeypatch.setattr(ops, verb, counting)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(16)[None])
    assert [shape[:-1] for shape in shapes] == 4 * [(1, 16)]  # q, k and v; o; gate and up; down


def test_the_configuration_keeps_them_and_a_saved_model_gets_them_again(tmp_path):
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, input_transforms=BOTH)
    assert len(transformed_sites(model)) == 4
    model.qat_config.save(tmp_path)
    config = QATConfig.load(tmp_path)
    assert config.input_transforms == BOTH and "hadamard inputs of *.down_proj, *.o_proj" in config.summary
    again = prepare_as_saved(make_llama(), config)
    assert [site.name for site in transformed_sites(again)] == [site.name for site in transformed_sites(model)]
    assert not config.same_training(prepare_qat(make_llama(), {nn.Linear: "MXFP4"}).qat_config)


@pytest.mark.parametrize(
    ("scheme", "transforms", "kwargs", "message"),
    [
        ("MXFP4", {"*.down_proj": "fourier"}, {}, "'fourier' is unknown; choose one of hadamard"),
        ("MXFP4", {"*.c_fc": "hadamard"}, {}, r"'\*\.c_fc' of input transforms matches no layer"),
        ("MXFP4", {"*.q_proj": "hadamard"}, {}, "engines fuse .*k_proj is not named"),
        ("INT4_G32", BOTH, {}, "which is in INT4_G32: .* mxfp4 or mxfp8"),
        ("MXFP4", BOTH, {"learn_exponent": True}, "learn_exponent=True and transformed inputs"),
        ("MXFP4", {"*": "hadamard"}, {"ignore": ()}, "name lm_head, the output head, which vLLM's transforms do not"),
    ],
)
def test_what_cannot_be_transformed_is_refused_and_the_model_unchanged(scheme, transforms, kwargs, message):
    model = make_llama()
    with pytest.raises(UserError, match=message):
        prepare_qat(model, {nn.Linear: scheme}, input_transforms=transforms, **kwargs)
    assert not quantized_sites(model)


def names_of(model):
    return {site.name for site in transformed_sites(model)}


def test_without_patterns_all_layers_are_transformed_that_engines_serve_so(tmp_path, capsys):
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, input_transforms="hadamard")
    assert len(names_of(model)) == 14
    assert "inputs of 14 of 14 layers transformed by Hadamard blocks of 32: q_proj, " in capsys.readouterr().out
    model.qat_config.save(tmp_path)
    config = QATConfig.load(tmp_path)
    assert "model.layers.*.mlp.down_proj" in config.input_transforms and len(config.input_transforms) == 7
    assert names_of(prepare_as_saved(make_llama(), config)) == names_of(model)
    with torch.device("meta"):
        on_meta = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, input_transforms="hadamard")
    assert config.same_training(on_meta.qat_config)


def test_layers_with_a_bias_and_those_that_are_fused_with_them_are_left(capsys):
    model = make_llama(layers=2)
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.ones(64))
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(64))
    prepare_qat(model, {nn.Linear: "MXFP4", "*.0.self_attn.o_proj": "MXFP8"}, input_transforms="hadamard")
    left = {"layers.0.mlp.down_proj", *(f"layers.1.self_attn.{own}_proj" for own in "qkv")}
    assert {site.name.removeprefix("model.") for site in quantized_sites(model)} - left == {
        name.removeprefix("model.") for name in names_of(model)
    }
    assert {key for key in model.qat_config.input_transforms if "*" not in key} == {
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }  # fmt: skip
    assert (
        "left: 2 with a bias, which vLLM's transforms do not take, 2 that engines fuse with one of these"
        in capsys.readouterr().out
    )


def test_experts_the_head_and_weights_in_other_formats_are_left(capsys):
    model = make_mixture()
    mapping = {nn.Linear: "MXFP4", "*.o_proj": "NVFP4"}
    prepare_qat(model, mapping, (), input_transforms="hadamard")
    assert names_of(model) == {f"model.layers.{layer}.self_attn.{own}_proj" for layer in (0, 1) for own in "qkv"}
    out = capsys.readouterr().out
    assert "inputs of 6 of 11 layers transformed by Hadamard blocks of 32: q_proj, k_proj, v_proj; left: " in out
    for reason in ("2 with weights in nvfp4", "2 of the kind experts", "1 the output head"):
        assert reason in out


def test_layers_that_are_experts_of_a_list_are_left():
    model = make_llama(layers=1)
    model.experts = nn.ModuleList([nn.Linear(64, 64, bias=False)])
    prepare_qat(model, {nn.Linear: "MXFP4"}, input_transforms="hadamard")
    assert len(names_of(model)) == 7 and "experts.0" in {site.name for site in quantized_sites(model)}


@pytest.mark.parametrize(
    ("scheme", "transform", "kwargs", "message"),
    [
        ("NVFP4", "hadamard", {}, r"no input of this model, .* 7 with weights in nvfp4.*: --input_transform none"),
        ("MXFP4", "fourier", {}, "the input transform 'fourier' is unknown; choose one of hadamard"),
        ("MXFP4", "hadamard", {"learn_exponent": True}, "learn_exponent=True and transformed inputs"),
    ],
)
def test_a_transform_of_no_layer_is_refused_and_the_model_unchanged(scheme, transform, kwargs, message):
    model = make_llama(layers=1)
    with pytest.raises(UserError, match=message):
        prepare_qat(model, {nn.Linear: scheme}, input_transforms=transform, **kwargs)
    assert not quantized_sites(model)


def test_experts_that_a_pattern_names_are_refused():
    with pytest.raises(UserError, match="of the kind experts; only linear layers .* --input_transform_layers auto"):
        prepare_qat(make_mixture(), {nn.Linear: "MXFP4"}, input_transforms={"*": "hadamard"})
