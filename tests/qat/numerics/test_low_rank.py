"""Merging an adapter into a weight: each operation is rounded once, in one order, by the plain function and kernels."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from same_bits import DTYPES, assert_same_bits, needs_cpu_kernels

from qat.numerics import low_rank, mx, ops
from qat.numerics.families import family_of, formats, get_format
from qat.numerics.kernels import cpu_merge, triton_merge
from qat.numerics.rules import MX_RULES

INF, NAN, SMALLEST = float("inf"), float("nan"), 2.0**-149
HARD = [0.0, -0.0, 1.0, -1.5, 3e38, -3e38, 1e-38, SMALLEST, -SMALLEST, 1 + 2**-23, INF, -INF, NAN]


def to_fp32(exact: Fraction) -> float:
    """The nearest FP32 number of a fraction, to even."""
    if exact == 0:
        return 0.0
    exponent = max(len(bin(abs(exact.numerator))) - len(bin(exact.denominator)) - 1, -127)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(exact / step) * step
    return float(rounded) if abs(rounded) < 2**128 else INF * (1 if rounded > 0 else -1)


def merged_exactly(weight, a, b, scaling: float) -> torch.Tensor:
    """W + s B A of finite FP32 tensors, in rational numbers that are rounded where the specification rounds."""
    result = torch.empty_like(weight)
    for n, k in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        total = 0.0
        for rank in range(len(a)):
            total = to_fp32(Fraction(b[n, rank].item()) * Fraction(a[rank, k].item()) + Fraction(total))
        product = to_fp32(Fraction(scaling) * Fraction(total))
        result[n, k] = to_fp32(Fraction(weight[n, k].item()) + Fraction(product))
    return result


def random(shape, seed: int, spread: int = 0) -> torch.Tensor:
    """FP32 numbers; with a spread, of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.exp2(torch.randint(-spread, spread + 1, shape, generator=generator).float())


def hard_case(dtype: torch.dtype, *shape: int, rank: int):
    """W [..., N, K] in a dtype, A and B with values of which some overflow, vanish or are not finite."""
    *stack, rows, columns = shape
    weight = random(shape, 1, 12).to(dtype)
    a, b = random((*stack, rank, columns), 2, 30), random((*stack, rows, rank), 3, 30)
    for tensor, seed in ((weight, 4), (a, 5), (b, 6)):
        flat = tensor.flatten()
        some = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))[: max(1, flat.numel() // 40)]
        flat[some] = torch.tensor(HARD, dtype=dtype).repeat(len(some))[: len(some)].to(flat.dtype)
        tensor.copy_(flat.view_as(tensor))
    return weight, a, b


@pytest.mark.parametrize("spread", [0, 3, 40])
def test_each_operation_of_a_merge_is_rounded_once(spread):
    weight, a, b = random((3, 5), 1), random((7, 5), 2, spread), random((3, 7), 3, spread)
    scaling = float(torch.tensor(4 / 3, dtype=torch.float32))
    assert_same_bits(low_rank.merge(weight, a, b, scaling), merged_exactly(weight, a, b, scaling))


def test_sums_beside_the_middle_of_two_fp32_numbers_are_not_rounded_twice():
    """b a = 2^-24 - 2^-70: FP64 loses the small part, and the tie that is left would go to the even neighbour."""
    b, a, odd = (torch.tensor([x]) for x in (2**-12 * (1 + 2**-23), 2**-12 * (1 - 2**-23), 1 + 2**-23))
    assert (b.double() * a.double() + odd.double()).float().item() == 1 + 2**-22  # rounded twice
    assert low_rank._fma(b, a, odd).item() == 1 + 2**-23
    assert low_rank._fma(-b, a, odd).item() == 1 + 2**-23


@pytest.mark.skipif(ctypes.util.find_library("m") is None, reason="no C library with fmaf")
def test_the_fused_multiply_add_is_that_of_the_c_library_for_all_kinds_of_values():
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    values = torch.tensor([*HARD, *random((6,), 1, 60).tolist(), *random((6,), 2, 60).tolist()])
    b, a, addend = (t.flatten() for t in torch.meshgrid(values, values, values, indexing="ij"))
    expected = torch.tensor([fmaf(*three) for three in zip(b.tolist(), a.tolist(), addend.tolist(), strict=True)])
    assert_same_bits(low_rank._fma(b, a, addend), expected)


def test_a_merged_weight_has_the_dtype_of_the_weight_rounded_to_nearest_even():
    weight = torch.tensor([[1.0, 1.0, 1 + 2**-7]], dtype=torch.bfloat16)
    a, b = torch.tensor([[2.0**-8, 2.0**-8 + 2.0**-20, 2.0**-8]]), torch.tensor([[1.0]])
    expected = torch.tensor([[1.0, 1 + 2**-7, 1 + 2**-6]], dtype=torch.bfloat16)
    assert_same_bits(low_rank.merge(weight, a, b, 1.0), expected)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 70])
def test_the_cpu_kernel_merges_as_the_plain_function(dtype, rank):
    for shape in ((1, 1), (5, 3), (4, 64), (37, 130), (66, 160), (3, 9, 65)):
        weight, a, b = hard_case(dtype, *shape, rank=rank)
        assert_same_bits(cpu_merge.merge(weight, a, b, 1.7), low_rank.merge(weight, a, b, 1.7))


@needs_cpu_kernels
def test_the_cpu_kernel_takes_many_columns_and_any_layout():
    weight, a, b = hard_case(torch.bfloat16, 4, 2100, rank=70)  # several panels of A
    assert_same_bits(cpu_merge.merge(weight, a, b, 0.5), low_rank.merge(weight, a, b, 0.5))
    weight, a, b = weight.t().contiguous().t(), a.t().contiguous().t(), b.t().contiguous().t()
    assert_same_bits(cpu_merge.merge(weight, a, b, 0.5), low_rank.merge(weight, a, b, 0.5))
    assert cpu_merge.merge(torch.empty(0, 32), torch.empty(2, 32), torch.empty(0, 2), 1.0).shape == (0, 32)


@needs_cpu_kernels
def test_the_cpu_kernel_gives_the_same_bits_with_several_threads():
    weight, a, b = hard_case(torch.bfloat16, 3, 70, 96, rank=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        merged, rounded = (
            f(weight, a, b, 2.0, *rest)
            for f, rest in ((ops.merge, ()), (ops.fake_quantize_merged, ("mxfp4", "even", torch.bfloat16)))
        )
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(merged, low_rank.merge(weight, a, b, 2.0))
    assert_same_bits(rounded, ops.fake_quantize(merged, "mxfp4", "even", torch.bfloat16))


@pytest.mark.parametrize("fmt", formats())
@pytest.mark.parametrize(
    ("dtype", "view"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float16, torch.bfloat16), (torch.float16, torch.float16)],
)  # fmt: skip
def test_rounding_with_the_merge_is_rounding_what_was_merged(fmt, dtype, view):
    format_ = get_format(fmt)
    for shape in ((5, 128), (2, 33, 256)):
        weight, a, b = hard_case(dtype, *shape, rank=9)
        divisor = torch.tensor([300.0]) if format_.tensor_scale else None
        given = () if divisor is None else (divisor,)
        for rule in format_.rules:
            fused = ops.fake_quantize_merged(weight, a, b, 1.7, fmt, rule, view, divisor)
            merged = low_rank.merge(weight, a, b, 1.7)
            assert_same_bits(fused, family_of(format_).fake_quantize(merged, format_, rule, view, *given))


@pytest.mark.parametrize(
    "shapes",
    [((8, 32), (2, 31), (8, 2)), ((8, 32), (2, 32), (8, 3)), ((8, 32), (2, 32), (7, 2)), ((2, 8, 32), (2, 32), (8, 2))],
)
def test_factors_of_another_weight_are_refused(shapes):
    weight, a, b = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match="does not belong to"):
        ops.merge(weight, a, b, 1.0)
    with pytest.raises(ValueError, match="does not belong to"):
        ops.fake_quantize_merged(weight, a, b, 1.0, "mxfp4", "even", torch.bfloat16)


def compare_triton_with_reference(device: str, exact: bool) -> None:
    """The Triton kernels against the plain functions; run by the two tests below.

    Triton's interpreter multiplies and adds apart, so values there are such that both are exact.
    """
    for dtype, view in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        small, large = (((5, 96), 1), ((2, 18, 160), 5), ((5, 96), 32)), (((130, 416), 16), ((3, 65, 160), 70))
        for shape, rank in small if exact else large:
            *stack, rows, columns = shape
            weight, a, b = hard_case(dtype, *shape, rank=rank)
            if exact:
                weight = random(shape, 1, 4).to(dtype)
                a, b = (random(s, 2, 2).mul(8).round() for s in ((*stack, rank, columns), (*stack, rows, rank)))
            merged = low_rank.merge(weight, a, b, 0.25)
            given = tuple(tensor.to(device) for tensor in (weight, a, b))
            assert_same_bits(triton_merge.merge(*given, 0.25), merged)
            for fmt in mx.FORMATS.values():
                for rule in MX_RULES:
                    rounded = triton_merge.fake_quantize_merged(*given, 0.25, fmt, rule, view)
                    assert_same_bits(rounded, mx.fake_quantize(merged, fmt, rule, view))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_merges_as_the_plain_function_in_tritons_interpreter():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    script = "import test_low_rank; test_low_rank.compare_triton_with_reference('cpu', True)"
    result = subprocess.run(  # a process of its own, because Triton reads the variable when kernels are defined
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_triton_kernel_merges_as_the_plain_function_on_the_gpu():
    compare_triton_with_reference("cuda", False)
