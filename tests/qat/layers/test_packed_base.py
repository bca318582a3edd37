"""Packed bases: what is kept, that layers compute with it as with plain weights of its values, what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import make_llama, make_mixture
from torch import nn

from qat import SCHEMES, get_scheme, prepare_qat, quantized_share
from qat.errors import UserError
from qat.layers.adapted import attach, attach_to_experts
from qat.layers.calibration import calibrate_inputs
from qat.layers.lora import adapters
from qat.layers.packed_base import dequantized_base, is_own, pack_base, packed_sites, unpack_base
from qat.layers.packed_weight import PackedWeight, packed_of
from qat.layers.share import left_unquantized, linear_weights
from qat.layers.sites import quantized_sites, quantizers_off
from qat.numerics import ops

IDS = torch.arange(3, 43)[None]
FITTING = [name for name in SCHEMES if "G128" not in name]  # layers of the models here are 64 and 96 wide
# Rules of scales that are no powers of two, which make other scales of values that they have rounded.
ROUNDS_TWICE = {("INT4_G32", None), ("NVFP4", "search"), ("NVFP4A16", "search")}


def prepared(scheme: str, rule: str | None = None, model: nn.Module | None = None) -> nn.Module:
    model = prepare_qat((model or make_llama()).bfloat16(), {nn.Linear: scheme}, weight_scale_rule=rule)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate_inputs(model, [{"input_ids": IDS}])
    return model.requires_grad_(False)


def add(model: nn.Module, seed: int = 0, zero: bool = False) -> nn.Module:
    """Adapters of rank 3 on every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            a = torch.randn(3, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, 3, generator=generator) * (0 if zero else 0.1)
            attach(module, a, b, 0.5)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(IDS).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_the_same_values(packed: nn.Module, like: nn.Module) -> nn.Module:
    """The model `like` with the weights that a packed one stands for, as plain BF16 parameters."""
    like.load_state_dict(dequantized_base(packed), strict=True)
    return like


@pytest.mark.parametrize("scheme", FITTING)
def test_the_base_is_what_an_export_packs_and_is_kept_in_its_bytes(scheme):
    plain = prepared(scheme)
    packed = pack_base(copy.deepcopy(plain))
    spec, widths = get_scheme(scheme).weight, set()
    for site, plain_site in zip(quantized_sites(packed), quantized_sites(plain), strict=True):
        divisor = None
        if spec.format.tensor_scale is not None:
            fused = [layer.weight for layer in plain_site.module.fused_with]
            divisor = ops.tensor_divisor(fused, spec.format.name, torch.bfloat16)
            widths.add(len(fused))
        quantized = ops.quantize(plain_site.weight, spec.format.name, spec.rule, torch.bfloat16, divisor)
        kept = packed_of(site.module)
        assert torch.equal(kept.codes, quantized.codes)
        assert torch.equal(site.weight, ops.dequantize(quantized, spec.format.name, torch.bfloat16))
        assert kept.nbytes == quantized.nbytes and {p.dtype for p in kept.parameters()} == {torch.uint8}
        assert list(kept.shape) == list(plain_site.weight.shape) == [*site.shape]
        assert isinstance(site.module, nn.Linear) and "weight" not in site.module._parameters
    assert widths in (set(), {1, 2, 3})
    assert {n for n, p in packed.named_parameters() if not is_own(n)} < {n for n, _ in plain.named_parameters()}


@pytest.mark.parametrize("scheme,rule", [*((name, None) for name in FITTING), ("MXFP4", "search"), ("NVFP4", "search")])
def test_a_model_computes_as_the_dequantized_one_prepared_and_without_a_second_rounding_as_ptq(scheme, rule):
    plain = prepared(scheme, rule)
    before = logits(plain)
    packed = pack_base(copy.deepcopy(plain))
    assert torch.equal(logits(add(copy.deepcopy(packed), zero=True)), logits(packed))
    assert torch.equal(logits(packed), before) is ((scheme, rule) not in ROUNDS_TWICE)
    assert torch.equal(logits(of_the_same_values(packed, plain)), logits(packed))


@pytest.mark.parametrize("scheme", FITTING)
def test_with_adapters_logits_and_gradients_are_those_of_plain_weights_of_the_same_values(scheme):
    plain = prepared(scheme)
    packed = pack_base(copy.deepcopy(plain))
    plain = add(of_the_same_values(packed, plain))
    add(packed)
    assert torch.equal(logits(packed), logits(plain))
    own, expected = gradients(packed), gradients(plain)
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    assert sum(name.endswith("lora_B") for name in own) == 14 and all(own[name].any() for name in own)
    merged = {f"{name}.weight": module.effective_weight().detach() for name, module in adapters(packed).items()}
    whole = prepared(scheme)
    whole.load_state_dict(dequantized_base(packed) | merged)
    for site, own_site in zip(quantized_sites(whole), quantized_sites(plain), strict=True):
        site.module.input_quantizer.divisor = own_site.module.input_quantizer.divisor
    assert torch.equal(logits(whole), logits(packed))


@pytest.mark.parametrize("scheme", sorted({*SCHEMES} - {*FITTING}))
def test_formats_in_blocks_of_128_are_packed_too(scheme):
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(256, 32)).bfloat16(), {nn.Linear: scheme}).requires_grad_(False)
    plain, x = copy.deepcopy(model), torch.randn(4, 256, dtype=torch.bfloat16)
    plain.load_state_dict(dequantized_base(pack_base(model)))
    for layer in (model[0], plain[0]):
        attach(layer, torch.ones(2, 256), torch.ones(32, 2) * 0.01, 1.0)
    assert torch.equal(model(x), plain(x))
    assert packed_of(model[0]).nbytes < plain[0].weight.nbytes / 3


def test_no_weight_in_bf16_is_kept_for_backward():
    layer = prepared("MXFP4").model.layers[0].mlp.down_proj
    model = nn.Sequential(layer)
    pack_base(model)
    attach(layer, torch.randn(2, 96), torch.randn(64, 2), 1.0)
    saved = []
    x = torch.randn(8, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).sum().backward()
    weight_elements = 64 * 96
    assert all(t.numel() * t.element_size() <= weight_elements // 2 for t in saved)  # codes are the largest
    assert any(t.data_ptr() == packed_of(layer).codes.data_ptr() for t in saved)
    assert layer.weight.shape == (64, 96) and layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ("qwen3_moe", "gpt_oss"))
@pytest.mark.parametrize("scheme", ("MXFP4", "NVFP4", "INT4_G32"))
def test_experts_are_packed_and_compute_and_pass_gradients_on_as_plain_ones(kind, scheme):
    plain = prepared(scheme, model=make_mixture(kind))
    packed = pack_base(copy.deepcopy(plain))
    plain = of_the_same_values(packed, plain)
    experts = [site for site in packed_sites(packed).values() if site.kind == "experts"]
    assert len(experts) == 4 and all(site.kept.dtype == torch.uint8 for site in experts)
    assert torch.equal(logits(packed), logits(plain))
    norm = packed.model.layers[0].input_layernorm.weight
    results = []
    for model in (packed, plain):
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        results.append(gradients(model))
    assert norm.grad.any() and torch.equal(*(result["model.layers.0.input_layernorm.weight"] for result in results))
    with quantizers_off(packed), quantizers_off(plain):
        assert torch.equal(logits(packed), logits(plain))


@pytest.mark.parametrize("scheme,kind", (("MXFP4", "qwen3_moe"), ("NVFP4", "gpt_oss")))
def test_packed_experts_with_adapters_compute_and_learn_as_plain_ones(scheme, kind):
    plain = prepared(scheme, model=make_mixture(kind))
    packed = pack_base(copy.deepcopy(plain))
    plain, results = of_the_same_values(packed, plain), []
    for model in (packed, plain):
        generator = torch.Generator().manual_seed(0)
        for site in [site for site in quantized_sites(model) if site.kind == "experts"]:
            n, k = site.shape
            a, b = (torch.randn(4, *size, generator=generator) * 0.1 for size in ((3, k), (n, 3)))
            attach_to_experts(site.owner, site.parameter, a, b, 0.5)
        results.append((logits(model), gradients(model)))
    (own, grads), (expected, expected_grads) = results
    assert torch.equal(own, expected) and grads.keys() == expected_grads.keys() and len(grads) == 8
    assert all(torch.equal(grads[name], expected_grads[name]) and grads[name].any() for name in grads)


def test_conv1d_keeps_its_codes_in_rows_and_its_weight_in_its_own_layout():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(Conv1D(64, 96)).bfloat16(), {nn.Linear: "MXFP4"}).requires_grad_(False)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    expected = model(x)
    pack_base(model)
    assert packed_of(model[0]).codes.shape == (64, 48) and model[0].weight.shape == (96, 64)
    assert torch.equal(model(x), expected)
    attach(model[0], torch.randn(2, 96), torch.randn(64, 2), 1.0)
    assert not torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model[0].adapter.lora_B.grad.any()


@pytest.mark.parametrize("model", (make_llama, make_mixture))
def test_unpacked_models_are_what_they_were_with_the_values_that_were_packed(model):
    plain = prepared("MXFP4", model=model())
    packed = pack_base(copy.deepcopy(plain))
    expected, values = logits(packed), dequantized_base(packed)
    unpacked = unpack_base(packed)
    assert [type(m) for m in unpacked.modules()] == [type(m) for m in plain.modules()]
    own = unpacked.state_dict()
    assert own.keys() == plain.state_dict().keys() and all(torch.equal(own[name], values[name]) for name in own)
    assert torch.equal(logits(unpacked), expected) and not packed_sites(unpacked)


def test_shares_and_names_count_packed_weights_as_what_they_stand_for():
    plain = prepared("MXFP4")
    packed = pack_base(copy.deepcopy(plain))
    assert quantized_share(packed) == quantized_share(plain) == 1.0
    assert {n: w.shape for n, w in linear_weights(packed).items()} == {
        n: w.shape for n, w in linear_weights(plain).items()
    }
    assert left_unquantized(packed, packed.qat_config) == left_unquantized(plain, plain.qat_config)
    assert "[64, 96] in mxfp4" in repr(packed)


def test_copies_and_pickles_are_packed_too():
    packed = add(pack_base(prepared("NVFP4")))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed.model.layers[0].mlp))):
        kept = [m for m in other.modules() if isinstance(m, PackedWeight)]
        assert kept and all(own.data_ptr() for m in kept for own in m.parameters())
    other = copy.deepcopy(packed)
    assert torch.equal(logits(other), logits(packed))
    packed.model.layers[0].mlp.down_proj.packed.codes.zero_()
    assert not other.model.layers[0].mlp.down_proj.weight.eq(0).all()


def test_casts_of_the_model_leave_codes_and_scales_alone():
    packed = pack_base(prepared("NVFP4"))
    expected = packed.model.layers[0].mlp.down_proj.weight
    assert torch.equal(packed.double().model.layers[0].mlp.down_proj.weight, expected)


def test_a_weight_that_the_embedding_shares_stays_and_is_named(caplog):
    model = prepare_qat(make_llama().bfloat16(), {"*": "MXFP4"}, ignore=())
    pack_base(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" in caplog.text and packed_of(model.model.layers[0].mlp.up_proj) is not None


def test_values_that_the_rule_would_move_are_counted_or_refused(caplog):
    packed = pack_base(prepared("INT4_G32"))
    assert "% of the values change" in caplog.text
    again = of_the_same_values(packed, prepared("INT4_G32"))
    with pytest.raises(UserError, match="q_proj cannot be packed as it was: scale rule absmax of int4_g32"):
        pack_base(again, exact=True)
    caplog.clear()
    for rule in ("floor", "even", "rceil", "search"):
        packed = pack_base(prepared("MXFP4", rule))
        again = pack_base(of_the_same_values(packed, prepared("MXFP4", rule)), exact=True)
        assert torch.equal(logits(again), logits(packed))
    assert "values change" not in caplog.text


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(UserError, match="no quantized layer"):
        pack_base(make_llama())
    learns = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, learn_exponent=True)
    with pytest.raises(UserError, match="q_proj learns scales of its weight"):
        pack_base(learns)
