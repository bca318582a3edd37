"""The executable specification against AutoRound, compressed-tensors and closed forms."""

from __future__ import annotations

import pytest
import torch
from auto_round.data_type.mxfp import quant_mx, quant_mx_rceil

from qat.numerics import mx
from qat.numerics.formats import Quantized
from qat.numerics.mx import E8M0_NAN, FORMATS, fake_quantize, quantize

MXFP4, MXFP8 = FORMATS.values()
EACH_FORMAT = pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=lambda f: f.name)
RULES = pytest.mark.parametrize("rule", ["floor", "even", "rceil", "search"])
AUTOROUND = {"floor": quant_mx, "rceil": quant_mx_rceil}


def all_bf16_blocks(seed: int = 0) -> torch.Tensor:
    """All 65,536 BF16 bit patterns, as [2048, 32]: in their order for seed 0, else shuffled into mixed magnitudes."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if seed:
        patterns = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(seed))]
    return patterns.to(torch.int16).view(torch.bfloat16).reshape(-1, 32)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    different = (actual.view(integer) != expected.view(integer)).nonzero()
    assert different.numel() == 0, f"{len(different)} elements differ, first at {different[0].tolist()}"


def block_of(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (32 - len(values))])


@EACH_FORMAT
@pytest.mark.parametrize("rule", AUTOROUND)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_bf16_patterns_equal_autoround_bit_for_bit(fmt, rule, seed):
    x = all_bf16_blocks(seed)
    x = x[x.isfinite().all(-1)]
    expected, _, _ = AUTOROUND[rule](x.clone(), bits=fmt.element.bits, group_size=32)
    assert_same_bits(fake_quantize(x, fmt, rule), expected)


@EACH_FORMAT
@pytest.mark.parametrize("rule", AUTOROUND)
def test_random_fp32_blocks_equal_autoround_bit_for_bit(fmt, rule):
    generator = torch.Generator().manual_seed(3)
    magnitudes = torch.exp2(torch.randint(-30, 30, (4096, 1), generator=generator).float())
    x = torch.randn(4096, 32, generator=generator) * magnitudes
    expected, _, _ = AUTOROUND[rule](x.clone(), bits=fmt.element.bits, group_size=32)
    assert_same_bits(fake_quantize(x, fmt, rule), expected)


@EACH_FORMAT
def test_fp32_midpoints_between_neighbouring_values_equal_autoround(fmt):
    grid = torch.arange(0, 128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:127]
    if fmt is MXFP4:
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middle = (grid[1:] + grid[:-1]) / 2
    near = torch.cat((middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))))
    x = torch.zeros(len(near), 32)
    x[:, 0], x[:, 1], x[:, 2] = fmt.element.largest, near, -near  # the block maximum fixes the scale at 1
    expected, _, _ = quant_mx(x.clone(), bits=fmt.element.bits, group_size=32)
    # Exempt, since AutoRound errs there: just below a power of two from 2^4 on FP32's log2 rounds up, and just below
    # half of the smallest value adding 0.5 rounds up.
    log2 = torch.log2(near).round()
    exempt = (near >= 15.9) & (torch.log2(near) == log2) & (near < log2.exp2())
    exempt |= near == middle[0].nextafter(torch.tensor(0.0))
    assert_same_bits(fake_quantize(x, fmt, "floor")[~exempt], expected[~exempt])


def test_exponent_just_below_a_power_of_two_is_exact_where_autoround_rounds_up():
    x = block_of(torch.tensor(16.0).nextafter(torch.tensor(0.0)).item())[None]
    assert fake_quantize(x, MXFP4, "floor")[0, 0] == 12.0  # floor(log2) = 3: scale 2, saturated at 6 * 2
    assert quant_mx(x.clone(), bits=4, group_size=32)[0][0, 0] == 16.0


@EACH_FORMAT
def test_a_value_just_below_half_of_the_smallest_rounds_to_zero_where_autoround_rounds_up(fmt):
    smallest = 2.0 ** (fmt.element.emin - fmt.element.mantissa_bits)
    x = block_of(fmt.element.largest, torch.tensor(smallest / 2).nextafter(torch.tensor(0.0)).item())[None]
    assert fake_quantize(x, fmt, "floor")[0, 1] == 0.0
    assert quant_mx(x.clone(), bits=fmt.element.bits, group_size=32)[0][0, 1] == smallest


@pytest.mark.parametrize(
    "rule,expected",
    [("floor", 0.75), ("even", 1.0), ("rceil", 1.0)],
)
def test_golden_block_maximum_of_0_9(rule, expected):
    # 0.9 = 1.8 * 2^-1. Floor keeps exponent -1 - 2: 7.2 saturates at 6, 6 * 2^-3 = 0.75. The others take -2: 3.6 -> 4.
    assert fake_quantize(block_of(0.9), MXFP4, rule)[0] == expected


@EACH_FORMAT
def test_scales_equal_compressed_tensors_under_rule_even(fmt):
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    x = all_bf16_blocks(seed=4).abs()
    # Outside, compressed-tensors wraps around (tiny blocks) or overflows to infinity (huge ones) instead of clamping.
    x = x[(x.amax(-1) > 2.0**-110) & (x.amax(-1) < 2.0**127)]
    (scale,) = quantize(x, fmt, "even").scales
    expected = generate_mx_scales(x.amax(-1, keepdim=True), num_bits=fmt.element.bits)
    assert torch.equal(scale.int(), expected.int())


@EACH_FORMAT
def test_searched_scale_is_the_better_of_floor_and_one_above(fmt):
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(5))
    floor, searched = (quantize(x, fmt, rule).scales[0].int() for rule in ("floor", "search"))
    candidates = [s.to(torch.uint8) for s in (floor, floor + 1)]
    codes = [mx.quantize_to_scale(x, s, fmt) for s in candidates]
    values = [mx.dequantize(Quantized(c, (s,)), fmt, torch.float32) for c, s in zip(codes, candidates, strict=True)]
    errors = [((x - value).double() ** 2).sum(-1) for value in values]
    clear = (errors[0] - errors[1]).abs() > 1e-6 * errors[0]
    assert torch.equal((searched - floor).flatten()[clear].bool(), (errors[1] < errors[0])[clear])
    assert 0 < (searched > floor).sum() < 500


@EACH_FORMAT
@RULES
def test_quantizing_twice_gives_the_values_of_quantizing_once(fmt, rule):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    once = fake_quantize(x, fmt, rule)
    # A block whose maximum was rounded up to the next power of two may get another scale, which its values still fit
    # in MXFP4; E4M3 has too few exponents below for that, which is why export packs from the weights.
    twice = fake_quantize(once, fmt, rule)
    assert torch.equal(twice, once) if fmt is MXFP4 else ((twice != once).float().mean() < 0.01)


@EACH_FORMAT
@RULES
def test_packing_and_unpacking_gives_the_fake_quantized_values(fmt, rule):
    x = all_bf16_blocks(seed=7)
    quantized = quantize(x, fmt, rule)
    packed, (scale,) = quantized.codes, quantized.scales
    assert packed.shape == (2048, 32 * fmt.element.bits // 8) and scale.shape == (2048, 1)
    fake, unpacked = fake_quantize(x, fmt, rule), mx.dequantize(quantized, fmt, x.dtype)
    finite = x.isfinite().all(-1)
    assert_same_bits(unpacked[finite], fake[finite])
    assert unpacked[~finite].isnan().all() and fake[~finite].isnan().all()


@EACH_FORMAT
@RULES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_nan_or_inf_becomes_nan_and_its_neighbour_does_not(fmt, rule, value):
    x = torch.ones(64)
    x[5] = value
    result, (scale,) = fake_quantize(x, fmt, rule), quantize(x, fmt, rule).scales
    assert result[:32].isnan().all() and torch.equal(result[32:], torch.ones(32))
    assert scale[0] == E8M0_NAN and scale[1] != E8M0_NAN


@EACH_FORMAT
@RULES
def test_a_zero_block_stays_zero(fmt, rule):
    assert torch.equal(fake_quantize(torch.zeros(2, 32), fmt, rule), torch.zeros(2, 32))


def test_mxfp4_bytes_have_the_even_element_in_the_low_nibble():
    quantized = quantize(block_of(0.5, -6.0, 4.0), MXFP4, "floor")
    packed, (scale,) = quantized.codes, quantized.scales
    assert packed[0] == 0x1 | 0xF << 4 and packed[1] == 0x6 and scale[0] == 127  # 0.5, -6, 4 under scale 2^0
