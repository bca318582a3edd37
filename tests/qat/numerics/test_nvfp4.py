"""NVFP4 against compressed-tensors, a search over all elements, and bytes written down by hand."""

from __future__ import annotations

import pytest
import torch

from qat.numerics import nvfp4, ops

(FMT,) = nvfp4.FORMATS.values()
RULES = pytest.mark.parametrize("rule", FMT.rules)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def values(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[40, 64], rows of different magnitudes, with zeros, negative zeros, a huge outlier and subnormal numbers."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 40)[:, None]
    x[3], x[4], x[5, 3], x[6] = 0.0, -0.0, 1e5, 1e-39
    return x.to(dtype)


def library_args():
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, dynamic="local",
        scale_dtype="torch.float8_e4m3fn",
    )  # fmt: skip


@DTYPES
def test_inputs_under_absmax_native_equal_compressed_tensors_bit_for_bit(dtype):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x, divisor = values(dtype), torch.tensor([37.5])
    scale, zero = compute_dynamic_scales_and_zp(x, library_args(), torch.nn.Module(), divisor)
    expected = fake_quantize(x, scale, zero, library_args(), global_scale=divisor)
    assert torch.equal(nvfp4.fake_quantize(x, FMT, "absmax_native", None, divisor), expected)
    assert torch.equal(nvfp4.quantize(x, FMT, "absmax_native", None, divisor).scales[0].float(), scale.float())


def test_bytes_of_weights_equal_the_compressor_of_compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    x = values(torch.float32)
    quantized = nvfp4.quantize(x, FMT, "absmax")
    blocks, (scale, divisor) = x.unflatten(-1, (4, 16)), quantized.scales
    expected, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), library_args(), global_scale=divisor)
    assert torch.equal(scale.float(), expected.float())
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=library_args())
    packed = compressor.compress({"weight": x, "weight_scale": expected, "weight_global_scale": divisor}, scheme)
    same = packed["weight_packed"] == quantized.codes
    # The library packs -0.0 for negative values that round to zero or not, depending on its kernel: values must agree.
    assert same[nvfp4.dequantize(quantized, FMT, torch.float32).view(40, 32, 2).ne(0).all(-1)].all()
    state = {"weight_packed": quantized.codes, "weight_scale": scale, "weight_global_scale": divisor}
    back = compressor.decompress(state, scheme)["weight"]
    assert torch.equal(nvfp4.dequantize(quantized, FMT, torch.bfloat16), back)


def test_bytes_of_a_block_written_down_by_hand():
    x = torch.zeros(1, 16)
    x[0, :8] = torch.tensor([12.0, -12.0, 1.0, 2.0, 3.0, -4.0, 0.5, 1.5])  # amax / 6 = 2
    quantized = nvfp4.quantize(x, FMT, "absmax", None, torch.tensor([1.0]))
    assert quantized.scales[0].float().item() == 2.0
    # 6 -6 .5 1 1.5 -2 0(.25 ties to even) 1(.75 ties to even), low nibble first; then zeros.
    assert quantized.codes[0].tolist() == [0xF7, 0x21, 0xC3, 0x20, 0, 0, 0, 0]


def test_the_divisor_brings_the_largest_scale_to_448():
    x = values(torch.float32)
    quantized = ops.quantize(x, "nvfp4", "absmax", torch.float32)
    scale, divisor = quantized.scales
    assert divisor.item() == pytest.approx(448 * 6 / 1e5) and scale.float().max() == 448.0
    assert nvfp4.tensor_divisor(torch.zeros(())).tolist() == [1.0]


@RULES
def test_every_value_becomes_the_nearest_element_times_the_scale(rule):
    x, divisor = values(torch.float32), torch.tensor([37.5])
    quantized = nvfp4.quantize(x, FMT, rule, None, divisor)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    scale = (quantized.scales[0].double() / divisor.double()).repeat_interleave(16, -1)
    distance = (x.double().abs()[..., None] - grid * scale[..., None]).abs().amin(-1)
    found = nvfp4.dequantize(quantized, FMT, torch.float32).double()
    assert ((x.double() - found).abs() <= distance * (1 + 1e-6) + x.double().abs() * 1e-6).all()


@RULES
@DTYPES
def test_packing_and_unpacking_gives_the_fake_quantized_values(rule, dtype):
    quantized = ops.quantize(values(dtype), "nvfp4", rule, dtype)
    unpacked = ops.dequantize(quantized, "nvfp4", dtype)
    assert torch.equal(unpacked, ops.fake_quantize(values(dtype), "nvfp4", rule, dtype, quantized.scales[1]))
    codes = nvfp4.quantize_to_scale(values(dtype), quantized.scales[0], FMT, None, quantized.scales[1])
    assert torch.equal(codes, quantized.codes)


def test_a_searched_scale_is_never_worse_and_often_better():
    def error(rule: str) -> torch.Tensor:
        return (nvfp4.fake_quantize(x, FMT, rule) - x).unflatten(-1, (-1, 16)).square().sum(-1)

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert (error("search") <= error("absmax") * (1 + 1e-6)).all()
    assert (error("search") < error("absmax")).float().mean() > 0.3


@RULES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_nan_or_inf_becomes_nan_and_its_neighbour_does_not(rule, value):
    x = torch.ones(2, 32)
    x[0, 5] = value
    divisor = torch.tensor([448.0])
    result = nvfp4.fake_quantize(x, FMT, rule, None, divisor)
    assert result[0, :16].isnan().all() and result[0, 16:].isfinite().all() and result[1].isfinite().all()
    assert int(nvfp4.broken_blocks(nvfp4.quantize(x, FMT, rule, None, divisor), FMT)) == 1


@pytest.mark.parametrize("rule", FMT.rules)
@pytest.mark.parametrize("plain", [True, False])
def test_stacked_weights_have_a_divisor_each(rule, plain):
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0, 0.01]).view(
        3, 1, 1
    )
    divisor = nvfp4.tensor_divisor(x.abs().amax((1, 2)))
    assert divisor.shape == (3,)
    module, fmt = (nvfp4, FMT) if plain else (ops, "nvfp4")
    quantize, fake_quantize = module.quantize, module.fake_quantize
    together = quantize(x, fmt, rule, torch.bfloat16, divisor)
    values = fake_quantize(x, fmt, rule, torch.bfloat16, divisor)
    for i in range(3):
        own = quantize(x[i], fmt, rule, torch.bfloat16, divisor[i : i + 1])
        assert torch.equal(together.codes[i], own.codes)
        assert torch.equal(together.scales[0][i].float(), own.scales[0].float())
        assert torch.equal(values[i], fake_quantize(x[i], fmt, rule, torch.bfloat16, divisor[i : i + 1]))
    assert torch.equal(module.dequantize(together, fmt, torch.bfloat16), values)
    assert torch.equal(module.quantize_to_scale(x, together.scales[0], fmt, torch.bfloat16, divisor), together.codes)
