"""The fast kernels against the executable specification, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from same_bits import DTYPES, assert_same_bits, needs_cpu_kernels

from qat.numerics import fp8, integer, low_rank, mx, nvfp4
from qat.numerics.formats import Quantized
from qat.numerics.kernels import (
    cpu,
    cpu_fp8,
    cpu_int4,
    cpu_library,
    cpu_nvfp4,
    triton_fp8,
    triton_int4,
    triton_kernels,
    triton_nvfp4,
)
from qat.numerics.mx import FORMATS as MX
from qat.numerics.rules import MX_RULES

MXFP4, MXFP8 = MX.values()
FORMATS = pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=lambda f: f.name)
RULES = pytest.mark.parametrize("rule", MX_RULES)
FP8 = [(fmt, rule) for fmt in fp8.FORMATS.values() for rule in fmt.rules]
FP8_RULES = pytest.mark.parametrize(("fmt", "rule"), FP8, ids=[f"{fmt.name}-{rule}" for fmt, rule in FP8])
INT4 = [(fmt, rule) for fmt in integer.FORMATS.values() for rule in fmt.rules]
INT4_RULES = pytest.mark.parametrize(("fmt", "rule"), INT4, ids=[f"{fmt.name}-{rule}" for fmt, rule in INT4])
(NVFP4,) = nvfp4.FORMATS.values()


def hard_blocks(dtype: torch.dtype) -> torch.Tensor:
    """Blocks [N, 32] for every branch: all magnitudes, midpoints, thresholds, subnormals, zeros, NaN and infinity."""
    generator = torch.Generator().manual_seed(5)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Every multiple of 1/128 up to 4: grid points, midpoints and thresholds of both formats, under random exponents.
    steps = (random(-512, 513, 1024, 32) / 128.0) * torch.exp2(random(-150, 127, 1024, 1).float())
    beside = torch.cat((steps, steps.nextafter(torch.zeros(())), steps.nextafter(torch.tensor(torch.inf)))).to(dtype)
    if dtype == torch.float32:
        patterns = random(-(2**31), 2**31, 32768).to(torch.int32).view(dtype)
    else:
        patterns = torch.arange(65536)[torch.randperm(65536, generator=generator)].to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    # Neighbours in magnitude, so that not all but one of a block's values round to zero.
    alike = finite[finite.abs().argsort()][: len(finite) // 320 * 320].view(-1, 320)
    alike = alike[:, torch.randperm(320, generator=generator)].reshape(-1, 32)
    return torch.cat((beside, patterns.view(-1, 32), alike, torch.full((1, 32), -0.0, dtype=dtype)))


def hard_rows(dtype: torch.dtype, columns: int = 96) -> torch.Tensor:
    """The same values in longer rows, which FP8 formats take as they are."""
    blocks = hard_blocks(dtype).flatten()
    return blocks[: len(blocks) // columns * columns].view(-1, columns)


def halfway_rows(dtype: torch.dtype, scale: torch.Tensor, halves: tuple[float, ...]) -> torch.Tensor:
    """Rows [N, 128] with values at, and a few units of the last place beside, `halves` times the scales [N, n]."""
    generator = torch.Generator().manual_seed(6)

    def pick(choices: torch.Tensor) -> torch.Tensor:
        return choices[torch.randint(len(choices), (len(scale), 128), generator=generator)]

    of_value = scale.gather(1, torch.randint(scale.shape[1], (len(scale), 128), generator=generator))
    x = (pick(torch.tensor(halves)) * of_value).to(dtype)
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    near = (bits + pick(torch.tensor([-2, -1, 0, 0, 1, 2])).to(bits.dtype)).view(dtype)
    return near * pick(torch.tensor([-1, 1])).to(dtype)


def halfway_nvfp4(dtype: torch.dtype, divisor: float) -> torch.Tensor:
    """Rows [32, 128] of blocks with values between two elements under the scale of their maxima and its neighbours."""
    codes = torch.arange(40, 72)[:, None] + torch.tensor([0, 1, -1])
    scale = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() / torch.tensor(divisor)
    x = halfway_rows(dtype, scale, (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    x[:, ::16] = (6 * scale[:, :1]).to(dtype)
    return x


def halfway_int4(dtype: torch.dtype) -> torch.Tensor:
    """Rows [128, 128] of blocks with values between two elements under one of the scales of a search."""
    divisors = torch.tensor([8.0, 7.5, 7.0])
    amax = torch.arange(128, 256)[:, None].to(dtype)
    x = halfway_rows(dtype, (amax.float() / divisors).bfloat16().float(), tuple(n + 0.5 for n in range(-7, 7)))
    x[:, ::32] = amax
    return x


def assert_equals_plain(plain, kernels, x: torch.Tensor, fmt, rule: str, dtype: torch.dtype | None = None) -> None:
    """All functions of a family, on the CPU or on x's GPU."""
    host = x.cpu()
    assert_same_bits(kernels.fake_quantize(x, fmt, rule, dtype), plain.fake_quantize(host, fmt, rule, dtype))
    quantized, expected = kernels.quantize(x, fmt, rule, dtype), plain.quantize(host, fmt, rule, dtype)
    for actual, tensor in zip(quantized.tensors, expected.tensors, strict=True):
        assert_same_bits(actual, tensor)
    back = kernels.dequantize(quantized, fmt, dtype or x.dtype)
    assert_same_bits(back, plain.dequantize(expected, fmt, dtype or x.dtype))
    assert_same_bits(back, plain.fake_quantize(host, fmt, rule, dtype))


def assert_mx(kernels, x: torch.Tensor, fmt, rule: str, dtype: torch.dtype | None = None) -> None:
    """The same for MX formats, which have codes under given scales too."""
    assert_equals_plain(mx, kernels, x, fmt, rule, dtype)
    (scale,) = mx.quantize(x.cpu(), fmt, rule, dtype).scales
    # Under the rule's own scales and under others, from far too small to far too large.
    offsets = torch.randint(-12, 5, scale.shape, generator=torch.Generator().manual_seed(3))
    for offset in (0, offsets):
        scales = torch.where(scale == 255, 255, (scale.int() + offset).clamp(0, 254)).to(torch.uint8)
        actual = kernels.quantize_to_scale(x, scales.to(x.device), fmt, dtype)
        assert_same_bits(actual, mx.quantize_to_scale(x.cpu(), scales, fmt, dtype))


def assert_nvfp4(kernels, x: torch.Tensor, rule: str, view: torch.dtype | None, divisor: torch.Tensor) -> None:
    """All functions of NVFP4 under a divisor."""
    given = NVFP4, rule, view
    there = divisor.to(x.device)
    expected = nvfp4.quantize(x.cpu(), *given, divisor)
    assert_same_bits(kernels.fake_quantize(x, *given, there), nvfp4.fake_quantize(x.cpu(), *given, divisor))
    quantized = kernels.quantize(x, *given, there)
    for actual, tensor in zip(quantized.tensors, expected.tensors, strict=True):
        assert_same_bits(actual.float(), tensor.float())
    back = kernels.dequantize(quantized, NVFP4, view or x.dtype)
    assert_same_bits(back, nvfp4.dequantize(expected, NVFP4, view or x.dtype))
    others, clean = expected.scales[0].view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn), x.nan_to_num(1.0)
    codes = kernels.quantize_to_scale(clean, others.to(x.device), NVFP4, view, there)
    assert_same_bits(codes, nvfp4.quantize_to_scale(clean.cpu(), others, NVFP4, view, divisor))


@needs_cpu_kernels
@FORMATS
@RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_kernels_equal_the_reference(dtype, rule, fmt):
    assert_mx(cpu, hard_blocks(dtype), fmt, rule)


@needs_cpu_kernels
@FORMATS
@pytest.mark.parametrize("rule", ["rceil", "search"])
@pytest.mark.parametrize("view", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_kernels_quantize_the_view_of_another_dtype(dtype, view, rule, fmt):
    if dtype != view:
        assert_mx(cpu, hard_blocks(dtype), fmt, rule, view)


@needs_cpu_kernels
@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_kernels_dequantize_every_code_under_every_scale(dtype, fmt):
    scale = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 256 * 8 // fmt.element.bits // 32)
    every = Quantized(torch.arange(256).to(torch.uint8).repeat(256, 1), (scale,))
    assert_same_bits(cpu.dequantize(every, fmt, dtype), mx.dequantize(every, fmt, dtype))


@needs_cpu_kernels
@FP8_RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [None, torch.bfloat16], ids=str)
def test_cpu_kernels_of_fp8_equal_the_plain_functions(view, dtype, fmt, rule):
    assert_equals_plain(fp8, cpu_fp8, hard_rows(dtype, fmt.block or 96), fmt, rule, view)


@needs_cpu_kernels
@INT4_RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [None, torch.bfloat16], ids=str)
def test_cpu_kernels_of_int4_equal_the_plain_functions(view, dtype, fmt, rule):
    x = hard_rows(dtype, 128)
    assert_equals_plain(integer, cpu_int4, x, fmt, rule, view)
    (scale,) = integer.quantize(x, fmt, rule, view).scales
    other, x = scale.roll(1, 0), x.nan_to_num(1.0)  # a NaN has the NaN scale
    assert_same_bits(cpu_int4.quantize_to_scale(x, other, fmt, view), integer.quantize_to_scale(x, other, fmt, view))


@needs_cpu_kernels
@pytest.mark.parametrize("rule", NVFP4.rules)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divisor", [1.0, 896.0, 3e-5, 1e30])
def test_cpu_kernels_of_nvfp4_equal_the_plain_functions(divisor, view, dtype, rule):
    assert_nvfp4(cpu_nvfp4, hard_rows(dtype), rule, view, torch.tensor([divisor]))


@needs_cpu_kernels
def test_cpu_kernels_of_fp8_take_any_shape_stride_and_length_of_row():
    x = torch.randn(3 * 5 * 7 * 97 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    unaligned = x[1:].view(3, 5, 7, 97)
    for tensor in (
        unaligned,
        unaligned.transpose(0, 2),
        unaligned[:, ::2, :, 3:64],
        unaligned[0, 0, 0],
        x.new_empty(0, 32),
    ):
        for fmt, rule in FP8:
            if fmt.fits(tensor.shape[-1]):
                assert_equals_plain(fp8, cpu_fp8, tensor, fmt, rule)


@needs_cpu_kernels
@FORMATS
def test_cpu_kernels_take_any_shape_stride_and_alignment(fmt):
    x = torch.randn(3 * 5 * 7 * 96 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    unaligned = x[1:].view(3, 5, 7, 96)
    for tensor in (unaligned, unaligned.transpose(0, 2), unaligned[:, ::2, :, 32:64], unaligned[0, 0, 0]):
        assert_mx(cpu, tensor, fmt, "floor")
        assert_mx(cpu, tensor, fmt, "floor", torch.float32)
    for shape in ((0,), (0, 64), (4, 0), (2, 0, 32)):
        assert_mx(cpu, x.new_empty(shape), fmt, "search")


@needs_cpu_kernels
def test_large_tensors_on_many_threads_equal_small_ones():
    x = torch.randn(999, 32, generator=torch.Generator().manual_seed(0))
    many = 4 * cpu_library._LARGE_BYTES // x.nbytes
    expected = cpu.fake_quantize(x, MXFP4, "even", torch.bfloat16)
    actual = cpu.fake_quantize(x.repeat(many, 1), MXFP4, "even", torch.bfloat16)
    assert actual.nbytes > cpu_library._LARGE_BYTES
    assert torch.equal(actual.view(many, *expected.shape), expected.expand(many, -1, -1))


@needs_cpu_kernels
def test_cpu_kernels_leave_their_input_alone():
    x = hard_blocks(torch.bfloat16)
    before = x.clone()
    cpu.fake_quantize(x, MXFP8, "search")
    assert_same_bits(x, before)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.zeros(2, 33), None, "multiple of 32"),
        (torch.zeros(()), None, "multiple of 32"),
        (torch.zeros(32, dtype=torch.float64), torch.float32, "float64"),
        (torch.zeros(32), torch.float64, "dtype is torch.float64"),
        (torch.zeros(32, device="meta"), None, "meta"),
    ],
)
def test_what_the_kernels_cannot_take_is_an_error_that_names_it(x, dtype, message):
    with pytest.raises(ValueError, match=message):
        cpu.fake_quantize(x, MXFP4, "floor", dtype)


def test_scales_that_do_not_fit_the_codes_are_an_error():
    with pytest.raises(ValueError, match="need"):
        cpu.dequantize(Quantized(torch.zeros(2, 16).byte(), (torch.zeros(2, 2).byte(),)), MXFP4, torch.float32)
    with pytest.raises(ValueError, match="need torch.uint8 \\(2, 1\\)"):
        cpu.quantize_to_scale(torch.zeros(2, 32), torch.zeros(2, 2).byte(), MXFP4)


@pytest.fixture
def unloaded(monkeypatch):
    """The CPU backend as in a fresh process, before and after the test."""
    monkeypatch.delenv(cpu_library.SWITCH, raising=False)
    for cached in (cpu_library._library, cpu_library.function):
        cached.cache_clear()
    yield
    for cached in (cpu_library._library, cpu_library.function):
        cached.cache_clear()


def test_without_a_compiler_one_warning_names_the_remedy(unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found.*Install g\\+\\+") as caught:
        assert not cpu.is_available()
        assert not cpu.is_available()
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="the family's plain functions"):
        cpu.fake_quantize(torch.zeros(32), MXFP4, "floor")


def test_a_compiler_that_fails_is_quoted(unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{sys.executable} -W ignore -c pass")  # runs, and makes no file
    with pytest.warns(UserWarning, match="could not be built"):
        assert not cpu.is_available()


def test_the_kernels_can_be_switched_off_without_a_warning(monkeypatch):
    monkeypatch.setenv(cpu_library.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.is_available()


@needs_cpu_kernels
def test_builds_that_race_all_succeed_and_leave_one_library(monkeypatch, tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(cpu_library, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build() -> None:
        built.append(cpu_library._build(cpu_library._find_compiler(), ("-fPIC",)))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 3
    assert [*(tmp_path / "mx-qat").iterdir()] == [built[0]] and len(set(built)) == 1
    source.write_text('extern "C" int two() { return 2; }')
    build()
    assert built[3] != built[0]


@needs_cpu_kernels
def test_the_library_brings_no_openmp_runtime_of_its_own():
    assert b"libgomp" not in Path(cpu_library._library()._name).read_bytes()


def fuse_in_interpreter() -> None:
    """Let the interpreter's `fma` round once, as GPUs do; older versions of Triton round the product too."""
    from triton.runtime import interpreter

    def fma(self, *three):
        values = torch.broadcast_tensors(*(torch.from_numpy(np.atleast_1d(one.data)) for one in three))
        fused = low_rank._fma(*values).numpy().reshape(np.broadcast_shapes(*(one.data.shape for one in three)))
        return interpreter.TensorHandle(fused, three[0].dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def compare_triton_with_reference(device: str, blocks: int) -> None:
    """Some of the hard blocks through the Triton kernels; run by the two tests below."""
    generator = torch.Generator().manual_seed(0)
    for dtype, view, rule in (
        (torch.bfloat16, None, "floor"),
        (torch.float32, torch.bfloat16, "search"),
        (torch.float32, None, "rceil"),
        (torch.float16, None, "even"),
    ):
        x = hard_blocks(dtype)
        some = torch.randperm(len(x), generator=generator)[:blocks]
        x = torch.cat((x[some], x[-1:]))  # the last one is all -0.0
        for fmt in (MXFP4, MXFP8):
            assert_mx(triton_kernels, x.to(device), fmt, rule, view)
    assert_mx(triton_kernels, torch.empty(0, 64, device=device), MXFP4, "floor")
    for dtype, view in ((torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float32, None)):
        for fmt, rule in FP8:
            x = hard_rows(dtype, fmt.block or 96)
            x = x[torch.randperm(len(x), generator=generator)[: blocks // 3]]
            assert_equals_plain(fp8, triton_fp8, x.to(device), fmt, rule, view)
    for dtype, view in ((torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float16, None)):
        x = hard_rows(dtype, 128)
        x = x[torch.randperm(len(x), generator=generator)[: blocks // 4]]
        for fmt, rule in INT4:
            assert_equals_plain(integer, triton_int4, x.to(device), fmt, rule, view)
        for rule in NVFP4.rules:
            for divisor in (1.0, 896.0, 1e30):
                assert_nvfp4(triton_nvfp4, x.to(device), rule, view, torch.tensor([divisor]))
    # Scales that are powers of two, 1.5 times that, about that, and neither.
    divisors = 1.0, 2.0 / 3.0, 1.0 + 2.0**-23, 2.0 / 3.0 + 2.0**-20, 1.1, 37.7
    for dtype, divisor in zip(3 * (torch.bfloat16, torch.float32), divisors, strict=True):
        x = halfway_nvfp4(dtype, divisor)[:blocks]
        assert_nvfp4(triton_nvfp4, x.to(device), "search", None, torch.tensor([divisor]))
    for dtype in (torch.bfloat16, torch.float16):
        x = halfway_int4(dtype)[: blocks // 4]
        assert_equals_plain(integer, triton_int4, x.to(device), *INT4[1])
    long = torch.randn(2, 40000, generator=generator).bfloat16()  # in several tiles
    assert_equals_plain(fp8, triton_fp8, long.to(device), *FP8[1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_equal_the_reference_in_tritons_interpreter():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    script = "from test_kernels import *; fuse_in_interpreter(); compare_triton_with_reference('cpu', 130)"
    result = subprocess.run(  # a process of its own, because Triton reads the variable when kernels are defined
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_triton_kernels_equal_the_reference_on_the_gpu():
    compare_triton_with_reference("cuda", 1_000_000)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_its_backend_says_so():
    assert not triton_kernels.is_available()
