"""QuantLinear and TensorQuantizer: forward values, gradients, switches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat import QuantLinear, TensorQuantizer, convert, get_scheme, is_quantlinear
from qat.errors import UserError
from qat.numerics import mx, ops
from qat.numerics.mx import FORMATS
from qat.schemes.presets import PRESETS

MXFP4, MXFP8 = FORMATS.values()
SCHEMES = pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL"])


def make_layer(scheme: str = "MXFP4", bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    return convert(nn.Linear(64, 48, bias=bias), get_scheme(scheme), "layer")


def fake(x: torch.Tensor, scheme: str, tensor: str) -> torch.Tensor:
    fmt = MXFP4 if scheme.startswith("MXFP4") else MXFP8
    rule = "rceil" if scheme.endswith("RCEIL") and tensor == "input" else "floor"  # AutoRound: weights are floor
    return mx.fake_quantize(x, fmt, rule)


@SCHEMES
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (2, 3, 2, 64)])
def test_forward_and_gradients_equal_the_closed_form(scheme, shape):
    layer = make_layer(scheme)
    x = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(*shape[:-1], 48)
    layer(x).backward(gradient)

    quantized_x, quantized_w = fake(x.detach(), scheme, "input"), fake(layer.weight.detach(), scheme, "weight")
    g, q = gradient.reshape(-1, 48), quantized_x.reshape(-1, 64)
    assert torch.equal(layer(x), F.linear(quantized_x, quantized_w, layer.bias))
    torch.testing.assert_close(layer.weight.grad, g.T @ q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, (g @ quantized_w).reshape(shape), rtol=1e-6, atol=1e-6)


def test_non_contiguous_input_gives_what_its_copy_gives():
    layer = make_layer()
    x = torch.randn(64, 5).T
    assert not x.is_contiguous() and torch.equal(layer(x), layer(x.contiguous()))


@SCHEMES
def test_disabled_quantizers_give_exactly_nn_linear_also_after_a_step(scheme):
    layer, plain = make_layer(scheme), nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    layer.weight_quantizer.disable()
    layer.input_quantizer.disable()
    for step in range(2):
        x = torch.randn(7, 64)
        expected, actual = plain(x), layer(x)
        assert torch.equal(actual, expected), f"step {step}"
        for module, output in ((plain, expected), (layer, actual)):
            output.square().sum().backward()
            torch.optim.AdamW(module.parameters(), lr=0.1).step()
            module.zero_grad()


def test_one_disabled_quantizer_leaves_the_other_at_work():
    layer, x = make_layer(bias=False), torch.randn(3, 64)
    layer.input_quantizer.disable()
    assert torch.equal(layer(x), F.linear(x, fake(layer.weight, "MXFP4", "weight")))
    layer.input_quantizer.enable()
    layer.weight_quantizer.disable()
    assert torch.equal(layer(x), F.linear(fake(x, "MXFP4", "input"), layer.weight))


def test_inputs_in_nvfp4_alone_have_the_calibrated_divisor_too():
    layer, x = make_layer("NVFP4"), torch.randn(5, 64) * 3
    layer.weight_quantizer.disable()
    with pytest.raises(UserError, match="no calibrated scale for its input"):
        layer(x)
    layer.input_quantizer.divisor = torch.tensor([2.0])
    quantized = ops.fake_quantize(x, "nvfp4", "absmax", torch.float32, torch.tensor([2.0]))
    assert torch.equal(layer(x), F.linear(quantized, layer.weight, layer.bias))
    assert layer.input_divisor(torch.device("meta")).device.type == "meta"  # it goes where the input is


@pytest.mark.parametrize("scheme", PRESETS)
def test_no_rows_at_all_give_no_rows_and_gradients_of_zero(scheme):
    layer = convert(nn.Linear(128, 48), get_scheme(scheme), "layer")
    layer.input_quantizer.divisor = torch.ones(1) if layer.input_quantizer.needs_divisor else None
    x = torch.zeros(2, 0, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not layer.weight.grad.any() and not layer.bias.grad.any()


def test_autocast_quantizes_the_bf16_view_of_fp32_masters():
    layer, x = make_layer(bias=False), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    w = fake(layer.weight.bfloat16(), "MXFP4", "weight")
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, F.linear(fake(x.bfloat16(), "MXFP4", "input"), w))


def test_autocast_gradients_reach_the_fp32_masters():
    layer, x = make_layer(), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert {p.grad.dtype for p in (layer.weight, layer.bias, x)} == {torch.float32}
    expected = fake(x.detach().bfloat16(), "MXFP4", "input").float().sum(0).expand(48, 64)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-2, atol=1e-2)


def test_converting_keeps_object_parameters_and_state_dict_keys():
    linear = nn.Linear(64, 48)
    weight, keys = linear.weight, list(linear.state_dict())
    layer = convert(linear, get_scheme("MXFP8"), "layer")
    assert layer is linear and layer.weight is weight and isinstance(layer, nn.Linear) and is_quantlinear(layer)
    assert list(layer.state_dict()) == keys


def test_in_features_that_no_block_divides_are_refused_with_the_layers_name():
    with pytest.raises(ValueError, match="model.odd has in_features=48.*ignore"):
        convert(nn.Linear(48, 8), get_scheme("MXFP4"), "model.odd")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"bits": 3}, "bits=3"),
        ({"data_type": "int"}, "data_type='int'"),
        ({"block_size": 16}, "block_size=16"),
        ({"sym": False}, "sym=False"),
        ({"learn_exponent": True}, "learn_exponent=True.*scale_shape"),
        ({"data_type": "mx_fp4", "bits": 8}, "data_type='mx_fp4' with bits=8"),
        (
            {"data_type": "fp", "learn_exponent": True, "scale_shape": (2, 8)},
            "needs power-of-two scales, and fp8_channel has bf16",
        ),
    ],
)
def test_arguments_without_meaning_in_mx_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorQuantizer(**arguments)


def test_the_reference_systems_names_of_formats_are_known():
    quantizers = [TensorQuantizer(name) for name in ("mx_fp4", "mx_fp8", "mx_fp", "mx_fp4_rceil", "fp")]
    found = [(q.spec.format.name, q.spec.rule, q.bits, q.block_size) for q in quantizers]
    assert found == [
        ("mxfp4", "floor", 4, 32), ("mxfp8", "floor", 8, 32), ("mxfp8", "floor", 8, 32), ("mxfp4", "rceil", 4, 32),
        ("fp8_channel", "absmax", 8, -1),
    ]  # fmt: skip
    assert quantizers[3].data_type == "mx_fp_rceil" and TensorQuantizer("mx_fp_rceil", 4).spec == quantizers[3].spec


def test_saved_scale_is_the_biased_code_and_packs_the_weight():
    quantizer = TensorQuantizer(bits=4, scale_shape=(48, 64))
    weight = torch.randn(48, 64)
    quantizer(weight)
    expected = mx.quantize(weight, MXFP4, "floor")
    packed, (expected_scale,) = expected.codes, expected.scales
    assert quantizer.state_dict()["scale"].dtype == torch.uint8 and torch.equal(quantizer.scale, expected_scale)
    assert torch.equal(quantizer.weight_pack(weight, quantizer.scale)[0], packed)


def test_weight_pack_of_mxfp8_gives_e4m3_and_refuses_an_unbiased_scale():
    quantizer, weight = TensorQuantizer(bits=8), torch.randn(4, 64)
    expected = mx.quantize(weight, MXFP8, "floor")
    packed, (scale,) = expected.codes, expected.scales
    codes, _ = quantizer.weight_pack(weight, scale)
    assert codes.dtype == torch.float8_e4m3fn and torch.equal(codes.view(torch.uint8), packed)
    with pytest.raises(ValueError, match="need torch.uint8"):
        quantizer.weight_pack(weight, scale.float() - 127)


def test_a_quantizer_made_with_if_quant_false_never_quantizes():
    quantizer, x = TensorQuantizer(bits=4, if_quant=False), torch.randn(2, 32)
    quantizer.enable()
    assert quantizer(x) is x


def test_a_calibrated_divisor_follows_the_input_to_its_device():
    quantizer = TensorQuantizer.of(get_scheme("NVFP4").input)
    assert quantizer.divisor_on(torch.device("meta")) is None
    quantizer.divisor = torch.tensor([3.0])
    assert quantizer.divisor_on(torch.device("cpu")) is quantizer.divisor
    assert quantizer.divisor_on(torch.device("meta")).device.type == "meta"


def test_weight_pack_refuses_a_format_whose_tensor_scale_it_would_lose():
    quantizer = TensorQuantizer.of(get_scheme("NVFP4A16").weight)
    with pytest.raises(UserError, match="weight_pack gives no tensor scale, which nvfp4 has"):
        quantizer.weight_pack(torch.ones(2, 16), torch.ones(2, 1).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("scheme", PRESETS)
def test_a_width_that_the_blocks_of_a_scheme_do_not_divide_is_refused_by_name(scheme):
    layer, specs = torch.nn.Linear(200, 8), filter(None, (get_scheme(scheme).weight, get_scheme(scheme).input))
    block = next((spec.format.block for spec in specs if spec.format.block), None)
    if block is None:  # a scale for a whole row
        assert convert(layer, get_scheme(scheme), "up_proj")(torch.ones(1, 200)).shape == (1, 8)
        return
    with pytest.raises(UserError, match=f"up_proj has in_features=200, .* not a multiple of the block size {block} of"):
        convert(layer, get_scheme(scheme), "up_proj")
    assert type(layer) is torch.nn.Linear
