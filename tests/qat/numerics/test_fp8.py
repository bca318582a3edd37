"""FP8 against compressed-tensors, vLLM's formula and a search over all E4M3 values."""

from __future__ import annotations

import pytest
import torch

from qat.numerics import fp8

CHANNEL, TOKEN, GROUP = fp8.FORMATS.values()
EACH = [(fmt, rule) for fmt in fp8.FORMATS.values() for rule in fmt.rules]
EACH_RULE = pytest.mark.parametrize(("fmt", "rule"), EACH, ids=[f"{fmt.name}-{rule}" for fmt, rule in EACH])


def rows(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[2, 40, 128], magnitudes from 2^-20 to 2^20, a row of zeros among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 128, generator=generator) * torch.logspace(-20, 20, 40, base=2)[:, None]
    x[1, 7] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("fmt", [TOKEN, GROUP], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_under_absmax_native_equal_compressed_tensors_bit_for_bit(dtype, fmt):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    kind = {"strategy": "token"} if fmt.block is None else {"strategy": "group", "group_size": fmt.block}
    args = QuantizationArgs(num_bits=8, type="float", dynamic=True, symmetric=True, **kind)
    scale, zero = compute_dynamic_scales_and_zp(rows(dtype), args, torch.nn.Module())
    expected = fake_quantize(rows(dtype), scale, zero, args)
    assert torch.equal(fp8.fake_quantize(rows(dtype), fmt, "absmax_native"), expected)
    assert torch.equal(fp8.quantize(rows(dtype), fmt, "absmax_native").scales[0], scale.float())


def test_scales_of_weights_equal_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = rows()[0][:-1]
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    expected, _ = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), args)
    assert torch.equal(fp8.quantize(weight, CHANNEL, "absmax").scales[0], expected)


def test_scales_of_inputs_are_those_of_vllm():
    (scale,) = fp8.quantize(rows(), TOKEN, "absmax").scales
    expected = (rows().float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    assert scale.dtype == torch.float32 and torch.equal(scale, expected)


@EACH_RULE
def test_every_value_becomes_the_nearest_element_times_the_scale(fmt, rule):
    x = rows(torch.float32).reshape(-1, 128)
    quantized = fp8.quantize(x, fmt, rule)
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    grid = every[every.isfinite()] * quantized.scales[0].double().reshape(-1, 1)
    distance = (x.double()[..., None] - grid[:, None]).abs()
    found = fp8.dequantize(quantized, fmt, torch.float32).double()
    # Beyond half a step only by the roundings of quotient and product to FP32.
    assert ((x.double() - found).abs() <= distance.amin(-1) * (1 + 1e-5) + x.double().abs() * 1e-6).all()


@EACH_RULE
def test_packing_and_unpacking_gives_the_fake_quantized_values(fmt, rule):
    x = rows()
    quantized = fp8.quantize(x, fmt, rule)
    assert quantized.codes.shape == x.shape and quantized.scales[0].shape == (2, 40, 1)
    assert torch.equal(fp8.dequantize(quantized, fmt, x.dtype), fp8.fake_quantize(x, fmt, rule))
    assert quantized.scales[0].dtype == fmt.scale.storage


@EACH_RULE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_inf_becomes_nan_and_its_neighbour_does_not(fmt, rule, value):
    x = torch.ones(2, 128)
    x[0, 5] = value
    result, quantized = fp8.fake_quantize(x, fmt, rule), fp8.quantize(x, fmt, rule)
    assert result[0].isnan().all() and torch.allclose(result[1], torch.ones(128), rtol=2**-8)
    assert int(fp8.broken_blocks(quantized, fmt)) == 1 and not quantized.codes[0].any()


@EACH_RULE
def test_a_row_of_zeros_stays_zero(fmt, rule):
    assert torch.equal(fp8.fake_quantize(torch.zeros(2, 128), fmt, rule), torch.zeros(2, 128))
