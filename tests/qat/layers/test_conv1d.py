"""Linear layers of other classes: GPT-2's Conv1D against an nn.Linear with its weight transposed, and FalconLinear."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from qat import get_scheme, is_quantlinear, prepare_qat, quantized_share
from qat.layers.conv1d import convert_conv1d
from qat.layers.finish import finished_weights
from qat.layers.quant_linear import convert
from qat.layers.sites import quantized_sites, quantizers_off

GPT2 = {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 260, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 1}  # fmt: skip


def pair(dtype: torch.dtype = torch.float32) -> tuple[Conv1D, nn.Linear]:
    """A Conv1D and the nn.Linear that computes the same."""
    torch.manual_seed(0)
    conv, linear = Conv1D(48, 64), nn.Linear(64, 48)
    conv.bias.data.normal_()
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data.clone()
    return conv.to(dtype), linear.to(dtype)


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "NVFP4A16", "INT4_G32", "FP8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_conv1d_computes_what_a_linear_layer_with_its_weight_transposed_computes(scheme, autocast):
    conv, linear = pair()
    convert_conv1d(conv, get_scheme(scheme)), convert(linear, get_scheme(scheme))
    x = torch.randn(2, 5, 64)
    results = []
    for layer in (conv, linear):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(own)
        y.backward(torch.ones_like(y).cumsum(-1))
        results.append((y, own.grad, layer.rows(layer.weight.grad), layer.bias.grad))
    assert all(map(torch.equal, *results))
    assert isinstance(conv, Conv1D) and conv.weight.shape == (64, 48)


def test_a_conv1d_computes_what_it_did_with_its_quantizers_off():
    conv, _ = pair(torch.bfloat16)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    before = conv(x)
    model = prepare_qat(nn.Sequential(conv), {nn.Linear: "MXFP4"})
    assert not torch.equal(model(x), before)
    with quantizers_off(model):
        assert torch.equal(model(x), before)


def test_learned_exponents_of_a_conv1d_are_baked_along_its_blocks():
    conv, linear = pair()
    models = [prepare_qat(nn.Sequential(layer), {nn.Linear: "MXFP4"}, learn_exponent=True) for layer in (conv, linear)]
    baked = []
    for model in models:
        offset = model[0].weight_quantizer.exponent_offset
        offset.data = torch.arange(offset.numel()).view_as(offset) % 3 - 1.0
        baked.append(finished_weights(model, model.state_dict(), {})["0.weight"])
    assert baked[0].shape == (64, 48) and torch.equal(baked[0], baked[1].t())


def test_gpt2_is_quantized_whole_and_trains():
    model = prepare_qat(GPT2LMHeadModel(GPT2Config(**GPT2)), {nn.Linear: "MXFP4"})
    assert quantized_share(model) == 1.0 and model.qat_config.kinds == ("conv1d",)
    assert [site.label for site in quantized_sites(model)][:2] == [
        f"transformer.h.0.attn.{n}" for n in ("c_attn", "c_proj")
    ]
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_width_that_no_block_divides_is_told_by_the_first_dimension():
    model = nn.ModuleDict({"odd": Conv1D(64, 40), "even": Conv1D(40, 64)})
    prepare_qat(model, {nn.Linear: "MXFP4"})
    assert list(model.qat_config.left_alone) == ["odd"]


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_is_quantized_and_adds_its_bias_to_the_rounded_product(bias):
    torch.manual_seed(0)
    layer = FalconLinear(64, 48, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    model = prepare_qat(nn.Sequential(layer), {nn.Linear: "MXFP4"})
    weight, inputs = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    expected = inputs @ weight.T
    expected = expected + layer.bias if bias else expected
    assert torch.equal(model(x), expected) and is_quantlinear(layer)
    with quantizers_off(model):
        assert torch.equal(model(x), FalconLinear.forward(layer, x))


def test_a_falcon_model_is_quantized_whole():
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=260, bos_token_id=0, eos_token_id=1
    )
    model = prepare_qat(FalconForCausalLM(config), {nn.Linear: "MXFP4"})
    assert quantized_share(model) == 1.0 and model.qat_config.kinds == ("linear",)
