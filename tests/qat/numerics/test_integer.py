"""INT4 against compressed-tensors, a search over all elements, and bytes written down by hand."""

from __future__ import annotations

import pytest
import torch

from qat.numerics import integer
from qat.numerics.codes import as_stored
from qat.numerics.formats import INT4

G32, G128 = integer.FORMATS.values()
EACH = [(fmt, rule) for fmt in integer.FORMATS.values() for rule in fmt.rules]
EACH_RULE = pytest.mark.parametrize(("fmt", "rule"), EACH, ids=[f"{fmt.name}-{rule}" for fmt, rule in EACH])


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[40, 256], rows from 2^-20 to 2^20; one of zeros, one of negative zeros, one with a huge outlier."""
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 40, base=2)[:, None]
    x[7], x[8], x[9, 3] = 0.0, -0.0, 1e6
    return x.to(dtype)


@pytest.mark.parametrize("fmt", [G32, G128], ids=lambda fmt: fmt.name)
def test_codes_and_words_equal_compressed_tensors_under_the_same_scales(fmt):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = weights().float()
    quantized = integer.quantize(weight, fmt, "absmax")
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=fmt.block, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": weight, "weight_scale": quantized.scales[0].float()}
    packed = compressor.compress(state, scheme)
    assert torch.equal(as_stored(quantized.codes, INT4), packed["weight_packed"])
    back = compressor.decompress({**packed, "weight_scale": quantized.scales[0]}, scheme)["weight"]
    assert torch.equal(integer.dequantize(quantized, fmt, torch.bfloat16), back)


def test_scales_equal_compressed_tensors_but_for_blocks_of_zeros():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    blocks = weights().unflatten(-1, (8, 32))
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    expected, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    found, is_zero = integer.quantize(weights(), G32, "absmax").scales[0], blocks.abs().amax(-1) == 0
    assert torch.equal(found[~is_zero], expected[~is_zero]) and is_zero.sum() == 16


def test_bytes_of_a_block_written_down_by_hand():
    x = torch.zeros(1, 32)
    x[0, :8] = torch.tensor([7.5, -7.5, 1.0, 0.5, 1.5, -0.5, -1.0, 2.5])  # scale 1; ties to even; 7.5 ends at 7
    quantized = integer.quantize(x, G32, "absmax")
    assert quantized.scales[0].item() == 1.0
    # 7 -8 1 0 2 0 -1 2, plus 8, low nibble first; then zeros.
    assert quantized.codes[0].tolist() == [0x0F, 0x89, 0x8A, 0xA7, *[0x88] * 12]


@EACH_RULE
def test_every_value_becomes_the_nearest_element_times_the_scale(fmt, rule):
    x = weights(torch.float32)
    quantized = integer.quantize(x, fmt, rule)
    scale = quantized.scales[0].double().repeat_interleave(fmt.block, -1)
    distance = (x.double()[..., None] - torch.arange(-8, 8) * scale[..., None]).abs().amin(-1)
    found = integer.dequantize(quantized, fmt, torch.float32).double()
    assert ((x.double() - found).abs() <= distance * (1 + 1e-6) + x.double().abs() * 1e-6).all()


@EACH_RULE
def test_packing_and_unpacking_gives_the_fake_quantized_values(fmt, rule):
    quantized = integer.quantize(weights(), fmt, rule)
    assert quantized.codes.shape == (40, 128) and quantized.scales[0].shape == (40, 256 // fmt.block)
    unpacked = integer.dequantize(quantized, fmt, torch.bfloat16)
    assert torch.equal(unpacked.view(torch.int16), integer.fake_quantize(weights(), fmt, rule).view(torch.int16))
    assert torch.equal(integer.quantize_to_scale(weights(), quantized.scales[0], fmt), quantized.codes)


@pytest.mark.parametrize("fmt", [G32, G128], ids=lambda fmt: fmt.name)
def test_a_searched_scale_is_never_worse_and_often_better(fmt):
    def error(rule: str) -> torch.Tensor:
        difference = (integer.fake_quantize(x, fmt, rule) - x).unflatten(-1, (-1, fmt.block))
        return difference.square().sum(-1)

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert (error("search") <= error("absmax") * (1 + 1e-6)).all()
    assert (error("search") < error("absmax")).float().mean() > 0.5


@EACH_RULE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_nan_or_inf_becomes_nan_and_its_neighbour_does_not(fmt, rule, value):
    x = torch.ones(2, 128)
    x[0, 5] = value
    quantized = integer.quantize(x, fmt, rule)
    result = integer.fake_quantize(x, fmt, rule)
    assert result[0, : fmt.block].isnan().all() and result[1].isfinite().all()
    assert int(integer.broken_blocks(quantized, fmt)) == 1
