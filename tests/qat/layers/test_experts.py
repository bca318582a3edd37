"""Experts in fused parameters against a loop over linear layers, one for each expert and matrix."""

import copy
import io
import sys

import pytest
import torch
from helpers import make_mixture
from tiny_experts import CHOSEN, COUNT, HIDDEN, INNER, GptOss, Llama4TextExperts, Model, Plain, Transposed, Ungated
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qat import QATConfig, get_quantization_format, prepare_qat
from qat.errors import UserError
from qat.layers import expert_function
from qat.layers.calibration import calibrate_inputs, calibrated_scales
from qat.layers.experts import compute_in_autocast_dtype, layout_of
from qat.layers.finish import finished_weights
from qat.layers.sites import quantized_sites, quantizers_off


class Loop(nn.Module):
    """The same experts, two linear layers each."""

    def __init__(self, experts) -> None:
        super().__init__()
        self.layout = layout_of(experts)
        self.act_fn = experts.act_fn
        self.gate = getattr(experts, "_apply_gate", None)
        first, second = self.layout.parameters
        self.first = nn.ModuleList(self._linear(experts, first, e) for e in range(COUNT))
        self.second = nn.ModuleList(self._linear(experts, second, e) for e in range(COUNT))

    def _linear(self, experts, name, e):
        weight = getattr(experts, name).detach()[e]
        weight = weight.t() if self.layout.is_transposed else weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.layout.has_bias)
        linear.weight.data = weight.clone().contiguous()
        if self.layout.has_bias:
            linear.bias.data = getattr(experts, f"{name}_bias").detach()[e].clone()
        return linear

    def _expert(self, e, rows):
        y = self.first[e](rows)
        if self.gate is not None:
            y = self.gate(y)
        elif self.layout.has_gate:
            gate, up = y.chunk(2, -1)
            y = self.act_fn(gate) * up
        else:
            y = self.act_fn(y)
        return self.second[e](y)

    def forward(self, x, index, weights):
        result = torch.zeros_like(x)
        for e in range(COUNT):
            tokens, place = torch.where(index == e)
            if tokens.numel():
                y = self._expert(e, x[tokens]) * weights[tokens, place, None]
                result = result.index_add(0, tokens, y.to(x.dtype))
        return result


def inputs(seed=0, tokens=24, experts=COUNT):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:CHOSEN] for _ in range(tokens)])
    weights = torch.rand(tokens, CHOSEN, generator=generator)
    return x.requires_grad_(), index, weights.requires_grad_()


def gradients_of(loop, name):
    """Those of the loop's layers in the layout of the fused parameter."""
    layout = loop.layout
    layers = loop.first if name.removesuffix("_bias") == layout.parameters[0] else loop.second
    if name.endswith("_bias"):
        return torch.stack([layer.bias.grad if layer.bias.grad is not None else 0 * layer.bias for layer in layers])
    grads = [layer.weight.grad if layer.weight.grad is not None else 0 * layer.weight for layer in layers]
    stacked = torch.stack(grads)
    return stacked.transpose(1, 2) if layout.is_transposed else stacked


def backward(model, x, index, weights, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, index, weights)
    y.float().square().sum().backward()
    return y.detach()


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4A16", "MXFP4FP8", "INT4_G32", "FP8"])
@pytest.mark.parametrize("kind", [Plain, Ungated, Transposed, GptOss])
def test_outputs_and_gradients_are_those_of_a_loop_over_quantized_linear_layers(kind, scheme):
    model = Model(kind)
    loop = prepare_qat(Loop(model.experts), {nn.Linear: scheme}, ())
    prepare_qat(model, {nn.Linear: scheme}, ())
    fused, apart = inputs(), inputs()
    y, expected = backward(model, *fused), backward(loop, *apart)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(fused, apart, strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in model.experts.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients_of(loop, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Plain, Transposed])
def test_each_product_under_autocast_is_bit_equal_to_that_of_the_linear_layer(kind):
    model = Model(kind)
    loop = prepare_qat(Loop(model.experts), {nn.Linear: "MXFP4"}, ())
    prepare_qat(model, {nn.Linear: "MXFP4"}, ())
    x, index, weights = inputs()
    index[:] = 2  # all rows to one expert: the products have the same shapes
    index = index[:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, index, weights[:, :1]), loop(x, index, weights[:, :1]))


def test_nvfp4_has_a_divisor_for_each_expert_that_gate_and_up_share():
    model = Model(Plain)
    loop = prepare_qat(Loop(model.experts), {nn.Linear: "NVFP4"}, ())
    prepare_qat(model, {nn.Linear: "NVFP4"}, ())
    x, index, weights = inputs()
    batch = {"x": x.detach(), "index": index, "weights": weights.detach()}
    calibrate_inputs(model, [batch])
    scales = calibrated_scales(model)
    assert set(scales) == {f"experts.{name}.input_global_scale" for name in ("gate_up_proj", "down_proj")}
    for layers, name in ((loop.first, "gate_up_proj"), (loop.second, "down_proj")):
        for layer in layers:
            layer.input_quantizer.divisor = torch.tensor([scales[f"experts.{name}.input_global_scale"]])
    y, expected = backward(model, x, index, weights), backward(loop, *inputs())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheme", "learns"), [("MXFP4", "learn_exponent"), ("NVFP4A16", "learn_scale")])
@pytest.mark.parametrize("kind", [Plain, Transposed])
def test_learned_offsets_get_the_gradients_of_single_layers_and_are_baked(kind, scheme, learns):
    model = Model(kind)
    loop = prepare_qat(Loop(model.experts), {nn.Linear: scheme}, (), **{learns: True})
    prepare_qat(model, {nn.Linear: scheme}, (), **{learns: True})
    backward(model, *inputs()), backward(loop, *inputs())
    for site in quantized_sites(model):
        layers = loop.first if site.parameter == "gate_up_proj" else loop.second
        (offset,) = site.module.weight_quantizer.learned
        expected = torch.stack([layer.weight_quantizer.learned[0].grad for layer in layers])
        torch.testing.assert_close(offset.grad, expected, rtol=1e-4, atol=1e-5)
        offset.data.normal_(generator=torch.Generator().manual_seed(0))
        for e, layer in enumerate(layers):
            layer.weight_quantizer.learned[0].data.copy_(offset[e])
    baked, expected = (finished_weights(m, m.state_dict(), {}) for m in (model, loop))
    for name, part in (("gate_up_proj", "first"), ("down_proj", "second")):
        stacked = torch.stack([expected[f"{part}.{e}.weight"] for e in range(COUNT)])
        assert torch.equal(baked[f"experts.{name}"], stacked.transpose(1, 2) if kind is Transposed else stacked)


def test_an_expert_that_no_token_reaches_gets_a_zero_gradient():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, ())
    x, index, weights = inputs()
    index[index == 3] = 0
    backward(model, x, index, weights)
    for parameter in model.experts.parameters():
        assert torch.equal(parameter.grad[3], torch.zeros_like(parameter[3]))
        assert parameter.grad[:3].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16", None])
def test_frozen_experts_pass_the_same_gradient_to_their_inputs(scheme):
    trained, frozen = (compute_in_autocast_dtype(Model(Plain)) for _ in range(2))
    if scheme is not None:
        trained, frozen = (prepare_qat(model, {nn.Linear: scheme}, ()) for model in (trained, frozen))
    frozen.requires_grad_(False)
    grads = []
    for model in (trained, frozen):
        x, index, weights = inputs()
        backward(model, x, index, weights)
        grads.append((x.grad, weights.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_a_batch_without_tokens_gives_no_rows_and_zero_gradients():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, ())
    x, index, weights = inputs(tokens=1)
    x, weights = x.detach()[:0].requires_grad_(), weights.detach()[:0].requires_grad_()
    assert backward(model, x, index[:0], weights).shape == x.grad.shape == (0, HIDDEN)
    assert all(not parameter.grad.any() for parameter in model.experts.parameters())


def test_sizes_that_grouped_products_do_not_take_are_computed_expert_by_expert(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "INNER", 36)  # 72 bytes in BF16
    model = Model(Plain)
    loop = Loop(model.experts)
    compute_in_autocast_dtype(model)
    fused, apart = inputs(), inputs()
    y, expected = (backward(m, *given, autocast=True) for m, given in ((model, fused), (loop, apart)))
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(fused[0].grad, apart[0].grad, rtol=0.05, atol=0.05 * float(apart[0].grad.abs().max()))
    for name, parameter in model.experts.named_parameters():
        expected = gradients_of(loop, name)
        torch.testing.assert_close(parameter.grad, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["MXFP4", None])
def test_a_model_is_pickled_and_computes_the_same(scheme):
    model = make_mixture("qwen3_moe", layers=1)
    model = compute_in_autocast_dtype(model) if scheme is None else prepare_qat(model, {nn.Linear: scheme})
    file, ids = io.BytesIO(), torch.arange(12)[None]
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


def test_a_copy_keeps_the_class_that_another_library_gave_experts():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, ())
    wrapped = type("Wrapped", (type(model.experts),), {})  # as FSDP2 does
    model.experts.__class__ = wrapped
    assert type(copy.deepcopy(model).experts) is wrapped


def test_the_output_of_experts_is_quantized_on_request():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, ())
    before, seen = model(*inputs()), []
    quantizer = model.experts.projections["down_proj"].output_quantizer
    quantizer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    quantizer.if_quant = True
    assert not torch.equal(model(*inputs()), before)
    (exact, rounded), = seen  # fmt: skip
    assert torch.equal(rounded, expert_function.ops.fake_quantize(exact, "mxfp4", quantizer.spec.rule, exact.dtype))


@pytest.mark.parametrize(("mapping", "ignore"), [({nn.Linear: "MXFP4", "*.experts.*.down_proj": "MXFP8"}, ()),
                                                 ({nn.Linear: "MXFP4"}, ("*.experts.0.*",))])  # fmt: skip
def test_a_pattern_for_single_experts_is_refused_with_the_name_of_all_of_them(mapping, ignore):
    with pytest.raises(UserError, match="experts are named as a whole: model.layers.0.mlp.experts"):
        prepare_qat(make_mixture("qwen3_moe"), mapping, ignore)


def test_a_copy_computes_with_its_own_weights():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"}, ())
    twin = copy.deepcopy(model)
    expected = model(*inputs())
    twin.experts.down_proj.data.zero_()
    assert torch.equal(model(*inputs()), expected) and expected.any()
    assert not twin(*inputs()).any()


def test_rounding_a_few_experts_at_a_time_changes_nothing(monkeypatch):
    model = prepare_qat(Model(Transposed), {nn.Linear: "MXFP4"}, ())
    whole = [backward(model, *inputs()), *(p.grad.clone() for p in model.experts.parameters())]
    model.zero_grad()
    monkeypatch.setattr(expert_function, "CHUNK_BYTES", 3 * 4 * HIDDEN * INNER)  # one matrix, not two
    parts = [backward(model, *inputs()), *(p.grad for p in model.experts.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_sorted_rows_need_no_router():
    model = prepare_qat(Model(Llama4TextExperts), {nn.Linear: "MXFP4"}, ())
    twin = prepare_qat(Model(Transposed), {nn.Linear: "MXFP4"}, ())
    x = inputs(tokens=6 * COUNT)[0].detach()
    index = torch.arange(COUNT).repeat_interleave(6)[:, None]
    assert torch.equal(model.experts(x), twin.experts(x, index, torch.ones(len(x), 1)))


def test_the_state_dict_stays_and_the_input_is_quantized_once_a_token(monkeypatch):
    model = Model(Plain)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_qat(model, {"experts": "MXFP4"}, ())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shapes = []
    quantize = expert_function.ops.quantize
    monkeypatch.setattr(expert_function.ops, "quantize", lambda x, *a: shapes.append(x.shape) or quantize(x, *a))
    model(*inputs())
    assert shapes == [(24, HIDDEN), (48, INNER)]
    assert get_quantization_format(model) == "MXFP4"


def test_with_quantizers_off_and_without_any_the_model_computes_the_same():
    plain, model = Model(Plain), Model(Plain)
    expected = Loop(plain.experts)(*inputs())
    compute_in_autocast_dtype(plain)
    torch.testing.assert_close(plain(*inputs()), expected)
    prepare_qat(model, {nn.Linear: "MXFP4"}, ())
    assert not torch.allclose(model(*inputs()), expected, atol=1e-3)
    with quantizers_off(model):
        assert torch.equal(model(*inputs()), plain(*inputs()))


def test_under_autocast_plain_experts_are_computed_in_bfloat16():
    model = compute_in_autocast_dtype(Model(Plain))
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    x, index, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, index, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y.bfloat16(), rounded(x.bfloat16(), index, weights).bfloat16())


def test_a_width_that_no_block_divides_is_refused_by_name():
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(COUNT, HIDDEN, 40))

    with pytest.raises(UserError, match="experts.down_proj sums over 40 values"):
        prepare_qat(Model(Odd), {"experts": "MXFP4"}, ())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text", "nemotron_h"])
def test_models_of_transformers_compute_the_same_until_quantizers_are_on(kind):
    special = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64},
        "nemotron_h": {
            "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    }  # fmt: skip
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **special[kind]))
    for name, parameter in model.named_parameters():
        if "experts" in name:  # some are zero at first
            parameter.data.normal_(0, 0.05)
    ids = torch.randint(0, 260, (2, 12))
    expected = model(ids).logits
    compute_in_autocast_dtype(model)
    assert torch.equal(model(ids).logits, expected)
    prepare_qat(model, {nn.Linear: "MXFP4"})
    assert isinstance(model.qat_config, QATConfig)
    assert sum(site.kind == "experts" for site in quantized_sites(model)) >= 2
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    with quantizers_off(model):
        assert torch.equal(model(ids).logits, expected)


def test_sites_stay_while_fsdp1_keeps_their_parameters_flat():
    model = prepare_qat(Model(Plain), {nn.Linear: "MXFP4"})
    expected = [site.label for site in quantized_sites(model)]
    experts = next(site.owner for site in quantized_sites(model))
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name).detach().flatten()))
    assert [site.label for site in quantized_sites(model)] == expected != []
