"""Products with a Hadamard matrix: a definition by matrices, kernels against plain PyTorch, and the operator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from qat.numerics import e4m3_rows, hadamard, low_rank, mx, ops
from qat.numerics.formats import Quantized
from qat.numerics.kernels import HADAMARD, triton_hadamard, triton_kernels, triton_rows

ROOT = Path(__file__).resolve().parents[3]
MXFP4 = mx.FORMATS["mxfp4"]
MX = [(fmt, rule) for fmt in mx.FORMATS.values() for rule in fmt.rules]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wide(rows: int = 70, columns: int = 96) -> torch.Tensor:
    """Blocks of many magnitudes, zeros of both signs, an infinity and a NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-140, 120, (rows, columns // 32), generator=generator)).repeat_interleave(32, 1)
    x[3], x[4, 5], x[5, 40], x[6] = 0, torch.inf, torch.nan, -0.0
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    equal = a.view(integer) == b.view(integer)
    return a.dtype == b.dtype and a.shape == b.shape and bool((equal | (a.isnan() & b.isnan())).all())


def all_same(a: Quantized, b: Quantized) -> bool:
    return all(same(x.cpu(), y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_it_is_the_product_with_sylvesters_matrix_over_the_root_of_32():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    expected = torch.from_numpy(scipy_linalg.hadamard(32)).double()
    assert torch.equal(hadamard.matrix(dtype=torch.float64), expected)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    product = (x.double().view(-1, 32) @ expected / 32**0.5).view(50, 64)
    torch.testing.assert_close(hadamard.transform(x, torch.float32).double(), product, rtol=0, atol=2e-6)
    torch.testing.assert_close(hadamard.transform(hadamard.transform(x, torch.float32), torch.float32), x)


def test_of_bf16_values_it_is_the_product_of_matrices_bit_for_bit():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    product = x.double().view(-1, 32) @ hadamard.matrix(dtype=torch.float64)
    quotient = product.float() / torch.tensor(32.0).sqrt()
    assert same(hadamard.transform(x, torch.bfloat16), quotient.view(400, 64).bfloat16())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_the_device_has_the_same_bits(stored, dtype):
    kernels = triton_hadamard if triton_hadamard.is_available() else HADAMARD["cpu"]
    if not kernels.is_available():
        pytest.skip("no compiler")
    x = wide().to(stored)
    for values in (x, x[:, :32], x.view(2, 35, 96), x[:0]):
        assert same(kernels.transform(values.to(DEVICE), dtype).cpu(), hadamard.transform(values, dtype))


def test_the_gradient_is_transformed_too():
    x = torch.randn(3, 64, dtype=torch.float32, requires_grad=True)
    grad = torch.randn(3, 64).bfloat16()
    ops.transform(x, torch.bfloat16).backward(grad)
    assert same(x.grad, hadamard.transform(grad, torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(), (4, 33)])
def test_rows_that_are_no_blocks_are_refused(shape):
    for transform in (hadamard.transform, HADAMARD["cpu"].transform, ops.transform):
        with pytest.raises(ValueError, match="blocks of 32"):
            transform(torch.zeros(shape), torch.float32)


# ---- Kernels that round transform what they read ----


def test_a_corrected_product_is_the_quotient_in_bf16():
    """What `triton_device._over_root` computes, of every 31st mantissa and of multiples of 2^-133, some subnormal."""
    ordinary = torch.arange(0x3F800000, 0x40000000, 31, dtype=torch.int32).view(torch.float32)
    tiny = torch.arange(1 << 17, dtype=torch.int32).float() * 2.0**-133
    root = torch.full((1,), hadamard.ROOT)
    for x in (ordinary, tiny):
        quotient = x * (1 / root)
        rest = low_rank._fma(quotient, (-root).expand_as(x), x)
        corrected = low_rank._fma(rest, (1 / root).expand_as(x), quotient)
        assert same(corrected.bfloat16(), (x / root).bfloat16())
    assert (1 / root).item() == torch.tensor(1.0 / hadamard.ROOT).item()


def compare_fused(device: str, rows: int = 20) -> None:
    """The Triton kernels, transforming, against the plain functions of the transformed values; run by two tests."""
    for stored, view in ((torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2):
        x = wide(max(rows, 70)).to(stored)
        assert same(triton_hadamard.transform(x.to(device), view).cpu(), hadamard.transform(x, view))
        x = x[:rows]
        for values in (x, x.view(2, -1, 96)[:, ::2], x[:, 32:64], x[:0]):
            for fmt, rule in MX:
                transformed, given = hadamard.transform(values, view), values.to(device)
                rounded = mx.fake_quantize(transformed, fmt, rule, view)
                fake = triton_kernels.fake_quantize(given, fmt, rule, view, True)
                assert same(fake.cpu(), rounded), (fmt, rule)
                back = triton_kernels.fake_quantize(given, fmt, rule, view, True, True)
                assert same(back.cpu(), hadamard.transform(rounded, view)), (fmt, rule)
                quantized = triton_kernels.quantize(given, fmt, rule, view, True)
                assert all_same(quantized, mx.quantize(transformed, fmt, rule, view)), (fmt, rule)
                back = triton_kernels.dequantize(quantized, fmt, view, True)
                assert same(back.cpu(), hadamard.transform(rounded, view)), (fmt, rule)
            only_back = triton_kernels.fake_quantize(given, fmt, "floor", view, False, True)
            expected = hadamard.transform(mx.fake_quantize(values, fmt, "floor", view), view)
            assert same(only_back.cpu(), expected), fmt
    count = torch.zeros(1, dtype=torch.int64, device=device)
    lost = 0
    for at_a_time, stored, rule in ((8192, torch.bfloat16, "even"), (64, torch.float32, "search")):
        tile = patch.object(triton_rows, "_tile", lambda *_, size=at_a_time: (size, 1024))  # several, the last not full
        x = (wide(rows) * 1e-9).to(stored)
        transformed = hadamard.transform(x, torch.bfloat16)
        with tile:
            found = triton_rows.to_rows(x.to(device), MXFP4, rule, torch.bfloat16, True, count, True)
        quantized = mx.quantize(transformed, MXFP4, rule, torch.bfloat16)
        values, *others = e4m3_rows.from_mx(transformed, quantized, MXFP4)
        held, lost = others[1] == 0, lost + int(others[1].sum())
        assert same(found[0].cpu()[held].view(torch.uint8), values[held].view(torch.uint8))
        assert all(same(a.cpu(), b) for a, b in zip(found[1:], [*others, *quantized.tensors], strict=True))
    assert 0 < int(count) == lost
    compare_repair(device)


def compare_repair(device: str) -> None:
    """What lost rows take part in is computed from transformed values."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(70, 96, generator=generator), torch.randn(48, 96, generator=generator)
    x[5, :32], weight[7, :32] = x[5, :32] * 1e-7, weight[7, :32] * 1e-7
    operands = [ops.to_rows(t.to(device), "mxfp4", "even", torch.bfloat16, False, True)[0] for t in (x, weight)]
    out = torch.full((70, 48), 7.0, dtype=torch.bfloat16, device=device)
    triton_rows.repair(out, *operands, None)
    rounded = [mx.fake_quantize(hadamard.transform(t, torch.bfloat16), MXFP4, "even").double() for t in (x, weight)]
    expected = (rounded[0] @ rounded[1].t()).to(device, torch.bfloat16)
    torch.testing.assert_close(out[5], expected[5], rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(out[:, 7], expected[:, 7], rtol=2**-7, atol=1e-4)
    assert bool((out[6:, 8:] == 7).all())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_that_transform_equal_two_steps_in_tritons_interpreter():
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    script = "from test_kernels import fuse_in_interpreter as f; f(); import test_hadamard as t; t.compare_fused('cpu')"
    result = subprocess.run(  # a process of its own, because Triton reads the variable when kernels are defined
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_that_transform_equal_two_steps_on_the_gpu():
    compare_fused("cuda", 2000)


@pytest.mark.parametrize(("fmt", "rule"), [("mxfp4", "search"), ("mxfp8", "even"), ("fp8_token", "absmax")])
def test_operators_round_what_is_transformed(fmt, rule):
    x, dtype = wide(8).to(DEVICE), torch.bfloat16
    two = hadamard.transform(x.cpu(), dtype).to(DEVICE)
    assert same(ops.fake_quantize(x, fmt, rule, dtype, None, True), ops.fake_quantize(two, fmt, rule, dtype))
    pairs = zip(
        ops.quantize(x, fmt, rule, dtype, None, True).tensors, ops.quantize(two, fmt, rule, dtype).tensors, strict=True
    )
    assert all(same(a, b) for a, b in pairs)
    if fmt != "mxfp8":
        (rows, codes), (expected, its) = (ops.to_rows(t, fmt, rule, dtype, True, t is x) for t in (x, two))
        held = slice(None) if rows.lost is None else rows.lost == 0
        values = [r.values.view(torch.uint8)[held] for r in (rows, expected)]
        assert same(*values) and same(rows.scale, expected.scale)
        weight = ops.to_rows(torch.ones(32, 96, device=DEVICE), "mxfp4", "even", dtype)[0]
        assert same(ops.rows_product(rows, weight, None), ops.rows_product(expected, weight, None))


@pytest.mark.parametrize(("fmt", "rule"), [("mxfp4", "search"), ("mxfp8", "even"), ("fp8_token", "absmax")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_transform_back_what_they_rounded(fmt, rule, dtype):
    x = wide(8).to(DEVICE)
    for first in (False, True):
        rounded = ops.fake_quantize(x, fmt, rule, dtype, None, first)
        expected = hadamard.transform(rounded.cpu(), dtype)
        assert same(ops.fake_quantize(x, fmt, rule, dtype, None, first, True).cpu(), expected)
        quantized = ops.quantize(x, fmt, rule, dtype, None, first)
        expected = hadamard.transform(ops.dequantize(quantized, fmt, dtype).cpu(), dtype)
        assert same(ops.dequantize(quantized, fmt, dtype, True).cpu(), expected)


@pytest.mark.parametrize(("transforms", "times"), [((True, False), 1), ((False, True), 1), ((True, True), 0)])
def test_the_gradient_of_rounding_is_transformed_as_often_as_the_values_modulo_two(transforms, times):
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 64).bfloat16()
    ops.fake_quantize(x, "mxfp4", "even", torch.bfloat16, None, *transforms).backward(grad)
    assert same(x.grad, (hadamard.transform(grad, torch.bfloat16) if times else grad).float())
