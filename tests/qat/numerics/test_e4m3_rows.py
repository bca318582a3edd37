"""E4M3 rows: exact values, rows that lose some, and products, in plain PyTorch and in the Triton kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from qat.numerics import e4m3_rows, fp8, mx, ops
from qat.numerics.kernels import triton_rows

ROOT = Path(__file__).resolve().parents[3]
MXFP4 = mx.FORMATS["mxfp4"]
FP8 = {"fp8_token": "absmax", "fp8_channel": "absmax"}


def blocks_of_many_magnitudes(rows: int, columns: int) -> torch.Tensor:
    """FP32, with rows of zeros, a block of zeros, a NaN, an infinity, tiny and huge values."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-9, 9, (rows, columns // 32), generator=generator).float()
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(exponents).repeat_interleave(32, 1)
    x[0], x[1, :32], x[2, 7], x[3, 40] = 0, 0, torch.nan, torch.inf
    x[4] *= 1e-38
    x[5] *= 1e36
    return x


def rows_of(x: torch.Tensor, fmt: str = "mxfp4", rule: str = "even") -> e4m3_rows.Rows:
    return ops.to_rows(x, fmt, rule, torch.bfloat16)[0]


@pytest.mark.parametrize("rule", MXFP4.rules)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_hold_the_values_of_mxfp4_unless_they_are_marked(rule, dtype):
    x = blocks_of_many_magnitudes(64, 96).to(dtype)
    rows, quantized = ops.to_rows(x, "mxfp4", rule, torch.bfloat16, with_codes=True)
    values = mx.fake_quantize(x, MXFP4, rule, torch.bfloat16)
    held = rows.lost == 0
    assert 20 < held.sum() < 64
    assert torch.equal((rows.values.float() * rows.scale)[held], values.float()[held])
    expected = mx.quantize(x, MXFP4, rule, torch.bfloat16)
    assert torch.equal(quantized.codes, expected.codes) and torch.equal(quantized.scales[0], expected.scales[0])


def test_a_row_is_marked_when_its_blocks_span_more_than_thirteen_exponents():
    x = torch.ones(1, 64)
    for exponent, lost in ((-12, 0), (-13, 0), (-14, 1), (-30, 1)):
        x[0, 32:] = 2.0**exponent
        rows = rows_of(x, rule="floor")
        assert rows.lost.item() == lost, exponent
        if not lost:
            assert torch.equal(rows.values.float() * rows.scale, x)
    x[0, 32:] = 0
    assert rows_of(x).lost.item() == 0


def test_lost_rows_are_counted():
    before = int(ops.lost_rows(torch.device("cpu")))
    x = torch.ones(5, 64)
    x[1:3, :32] = 1e-9
    rows_of(x)
    assert int(ops.lost_rows(torch.device("cpu"))) - before == 2


@pytest.mark.parametrize("fmt", FP8)
def test_rows_of_fp8_are_its_codes_and_scales(fmt):
    x = torch.randn(3, 5, 32)
    rows, quantized = ops.to_rows(x, fmt, FP8[fmt], torch.bfloat16, with_codes=True)
    assert rows.lost is None and rows.values.data_ptr() == quantized.codes.data_ptr()
    values = fp8.dequantize(
        fp8.quantize(x, fp8.FORMATS[fmt], FP8[fmt], torch.bfloat16), fp8.FORMATS[fmt], torch.float32
    )
    assert torch.equal((rows.values.float() * rows.scale).view_as(x), values)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("formats", [("mxfp4", "mxfp4"), ("fp8_token", "mxfp4"), ("fp8_token", "fp8_channel")])
def test_a_product_is_that_of_the_quantized_values_lost_rows_included(formats, with_bias):
    x, weight = torch.randn(6, 64), torch.randn(16, 64)
    x[2, :32] *= 1e-9
    weight[3, 32:] *= 1e-9
    bias = torch.randn(16).bfloat16() if with_bias else None
    rows = [rows_of(t, f, FP8.get(f, "even")) for t, f in zip((x, weight), formats, strict=True)]
    values = [
        ops.fake_quantize(t.bfloat16().float(), f, FP8.get(f, "even"), torch.float32).double()
        for t, f in zip((x, weight), formats, strict=True)
    ]
    expected = values[0] @ values[1].t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(ops.rows_product(*rows, bias), expected.bfloat16(), rtol=2**-8, atol=1e-12)


# ---- The kernels ----


def compare_kernels(device: str) -> None:
    """Conversion and repair on a device or in Triton's interpreter against the specification; run by the two tests
    below."""
    count = torch.zeros(1, dtype=torch.int64, device=device)
    lost = 0
    for columns, at_a_time in ((96, 8192), (96, 64), (64, 64)):
        tile = patch.object(triton_rows, "_tile", lambda *_, size=at_a_time: (size, 1024))  # rows pass in several tiles
        for dtype in (torch.bfloat16, torch.float32):
            for rule in MXFP4.rules:
                x = blocks_of_many_magnitudes(16, columns).to(dtype)
                with tile:
                    found = triton_rows.to_rows(x.to(device), MXFP4, rule, torch.bfloat16, True, count)
                codes = mx.quantize(x, MXFP4, rule, torch.bfloat16)
                expected = e4m3_rows.from_mx(x.bfloat16(), codes, MXFP4)
                held, lost = expected[2] == 0, lost + int(expected[2].sum())
                assert torch.equal(found[0].cpu().view(torch.uint8)[held], expected[0].view(torch.uint8)[held])
                pairs = zip(found[1:], [*expected[1:], *codes.tensors], strict=True)
                assert all(torch.equal(a.cpu(), b) for a, b in pairs)
    assert int(count) == lost
    for formats in (("mxfp4", "mxfp4"), ("fp8_token", "mxfp4"), ("mxfp4", "fp8_channel")):
        compare_repair(device, formats)


def compare_repair(device: str, formats: tuple[str, str]) -> None:
    """Only what lost rows take part in is computed again."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(70, 96, generator=generator), torch.randn(48, 96, generator=generator)
    for tensor, own in ((x, 5), (x, 66), (weight, 7), (weight, 40)):
        tensor[own, :32] *= 1e-7
    operands = [rows_of(t.to(device), f, FP8.get(f, "even")) for t, f in zip((x, weight), formats, strict=True)]
    bias = torch.randn(48, generator=generator).bfloat16().to(device)
    out = torch.full((70, 48), 7.0, dtype=torch.bfloat16, device=device)
    triton_rows.repair(out, *operands, bias)
    lost = [o.values.new_zeros(len(o.values), dtype=torch.bool) if o.lost is None else o.lost > 0 for o in operands]
    touched = lost[0][:, None] | lost[1][None, :]
    assert 0 < touched.sum() < 300 and bool((out[~touched] == 7).all())
    expected = e4m3_rows.product(*operands, bias)
    torch.testing.assert_close(out[touched], expected[touched], rtol=2**-7, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_the_specification_in_tritons_interpreter():
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(  # a process of its own, because Triton reads the variable when kernels are defined
        [sys.executable, "-W", "ignore", "-c", "import test_e4m3_rows as t; t.compare_kernels('cpu')"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_equal_the_specification_on_the_gpu():
    compare_kernels("cuda")
