"""Baked values: codes and scales are found again for whatever a learned scale made, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat import convert, get_scheme
from qat.layers.baked_values import BakedValues, find_scales
from qat.numerics import integer, nvfp4, ops
from qat.numerics.formats import Quantized

FORMATS = {**integer.FORMATS, **nvfp4.FORMATS}


def any_values(name: str, rows: int = 64, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor | None]:
    """BF16 values of a format under arbitrary codes and scales, and the divisor; some blocks have few small codes."""
    generator, fmt = torch.Generator().manual_seed(5), FORMATS[name]
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    small = torch.randint(0, 3, codes.shape, generator=generator, dtype=torch.uint8)
    codes[:16] = small[:16] + (8 if name != "nvfp4" else 0)
    codes[0], codes[1, 1:] = 0x88 if name != "nvfp4" else 0, 0x77
    scale = torch.rand(fmt.scale_shape((rows, columns)), generator=generator)
    if name != "nvfp4":
        scales = ((scale * 3 - 1).exp().bfloat16(),)
    else:
        scale[-1, -1], codes[-1, -1] = 1.0, 0x77  # the largest magnitude: 6 under the largest scale
        scales = ((scale * 448).to(torch.float8_e4m3fn), nvfp4.tensor_divisor(torch.tensor(0.0713).bfloat16()))
    return ops.dequantize(Quantized(codes, scales), name, torch.bfloat16), (*scales, None)[1]


@pytest.mark.parametrize("name", FORMATS)
def test_values_under_arbitrary_scales_come_back_bit_for_bit(name):
    values, divisor = any_values(name)
    rule = ops.fake_quantize(values, name, "absmax", torch.bfloat16, divisor)
    assert (rule != values).any()  # no rule does that
    found = find_scales(values, FORMATS[name], divisor)
    FORMATS[name].check_scales(values.shape, found.scales[0])
    assert torch.equal(ops.dequantize(found, name, torch.bfloat16), values)
    assert torch.equal(find_scales(values.float(), FORMATS[name]).codes, found.codes)  # the divisor follows


def test_every_bf16_scale_of_a_binade_is_found_under_each_largest_element():
    scales = torch.arange(128, 256).float().div(128).bfloat16().repeat(8)
    largest = torch.arange(1, 9).repeat_interleave(128).float()
    values = torch.zeros(1024, 32)
    values[:, 0], values[:, 1] = -largest * scales.float(), (largest - 1) * scales.float()
    found = find_scales(values.bfloat16(), FORMATS["int4_g32"])
    assert torch.equal(ops.dequantize(found, "int4_g32", torch.bfloat16), values.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_values_of_no_scale_are_refused_and_nan_keeps_the_nan_scale(name):
    fmt, values = FORMATS[name], torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"blocks do not hold values of {name} under any scale"):
        find_scales(values, fmt)
    values = torch.zeros(4, 256)
    values[2, 3] = torch.nan
    divisor = torch.ones(1) if name == "nvfp4" else None
    found = find_scales(values, fmt, divisor)
    assert found.scales[0].isnan().sum() == 1 and found.scales[0][2, 0].isnan()


def test_a_layer_with_baked_values_computes_with_them_and_is_not_trained():
    values = any_values("int4_g32", 24, 256)[0].float()
    layer = convert(nn.Linear(256, 24, bias=False), get_scheme("INT4_G32"), "layer")
    layer.weight.data.copy_(values)
    layer.weight_quantizer.is_baked = True
    x = torch.randn(3, 256)
    with torch.no_grad():
        assert torch.equal(layer(x), x @ values.t())
        assert torch.equal(layer.weight_quantizer(layer.weight), values)
    for use in (lambda: layer(x), lambda: layer.weight_quantizer(layer.weight)):
        with pytest.raises(ValueError, match="cannot be trained further .*--quant_scheme"):
            use()
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], values.sum(0), rtol=1e-4, atol=1e-4)
    assert isinstance(layer.weight_quantizer.rounding, BakedValues)
