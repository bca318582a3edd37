"""All figures that need a GPU, in one run of a few minutes: kernels, training steps, memory, correctness.

    python benchmarks/gpu.py --out benchmarks/results

Kernels are compared with a copy of the same tensor, training steps with the BF16 step of the same model and batch,
alternating in one process. The last lines are one table.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.fake_quant import divisor_of, kernels_for  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import TrainingStep, make_batch, make_model, saved_bytes_of_a_block  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.layers import linear_function  # noqa: E402
from qat.numerics.families import family_of, formats  # noqa: E402
from qat.numerics.mx import FORMATS  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402

SHAPES = ((8192, 8192), (4096, 14336))
SCHEMES = ("MXFP4", "MXFP8", "FP8", "MXFP4A16", "MXFP8A16", "MXFP4FP8", "MXFP4FP8_G128", "MXFP4MXFP8", "NVFP4",
           "NVFP4A16", "INT4_G32", "INT4_G128")  # fmt: skip
AT_A_TIME = 3  # schemes whose models, with their optimizers, are there at a time, beside BF16


def device_seconds(run: Callable[[], object], milliseconds: int = 100) -> float:
    """Median time of `run` on the device, its L2 cache cold, launches hidden: by Triton's own bench."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=milliseconds, return_mode="median") / 1e3


def check_kernels(report: Report) -> None:
    """All BF16 bit patterns, and FP32 of many magnitudes: the GPU's bits against the specification's on the CPU."""
    patterns = torch.arange(65536, dtype=torch.int32)[torch.randperm(65536, generator=torch.Generator().manual_seed(1))]
    bf16 = patterns.to(torch.int16).view(torch.bfloat16).reshape(-1, 128)
    generator = torch.Generator().manual_seed(2)
    fp32 = torch.randn(20000, 32, generator=generator) * torch.exp2(
        torch.randint(-60, 60, (20000, 1), generator=generator).float()
    )
    fp32 = fp32.reshape(-1, 128)
    differ = 0
    for x in (bf16, fp32, fp32.half()):
        for fmt in formats().values():
            kernels, family = kernels_for(x.cuda(), fmt), family_of(fmt)
            for rule in fmt.rules:
                for dtype in {x.dtype, torch.bfloat16}:
                    fake = kernels.fake_quantize(x.cuda(), fmt, rule, dtype).cpu()
                    differ += count_different(fake, family.fake_quantize(x, fmt, rule, dtype))
                    quantized, expected = (f(y, fmt, rule, dtype) for f, y in (
                        (kernels.quantize, x.cuda()), (family.quantize, x)
                    ))  # fmt: skip
                    for ours, theirs in zip(quantized.tensors, expected.tensors, strict=True):
                        differ += count_different(ours.cpu(), theirs)
                    back = kernels.dequantize(quantized, fmt, dtype).cpu()
                    differ += count_different(back, family.dequantize(expected, fmt, dtype))
    report.add("elements that differ from plain PyTorch", differ, "0")


def count_different(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements whose bits differ, NaNs of any kind being equal."""
    if a.element_size() == 1:
        return int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int(((a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())).sum())


def time_kernels(report: Report) -> None:
    """Bytes moved over time, as a fraction of what a copy of the tensor achieves."""
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda").bfloat16()
        target = torch.empty_like(x)
        copy_rate = 2 * x.nbytes / device_seconds(lambda: target.copy_(x))  # noqa: B023
        report.add(f"copy {shape[0]}x{shape[1]} BF16", copy_rate / 1e12, unit="TB/s")
        for fmt in formats().values():
            kernels, rule = kernels_for(x, fmt), fmt.rules[0]
            given = divisor_of(x, fmt)
            quantized = kernels.quantize(x, fmt, rule, None, *given)
            moved = {"fake": 2 * x.nbytes, "pack": x.nbytes + quantized.nbytes}
            moved["unpack"] = moved["pack"]
            calls = {
                "fake": lambda k=kernels, f=fmt, r=rule, x=x, g=given: k.fake_quantize(x, f, r, None, *g),
                "pack": lambda k=kernels, f=fmt, r=rule, x=x, g=given: k.quantize(x, f, r, None, *g),
                "unpack": lambda k=kernels, f=fmt, q=quantized: k.dequantize(q, f, torch.bfloat16),
            }
            for name, call in calls.items():
                fraction = moved[name] / device_seconds(call) / copy_rate
                report.add(f"{name} {fmt.name} {shape[0]}x{shape[1]}", fraction, "0.80" if name == "fake" else "0.70")
            if "search" in fmt.rules:
                seconds = device_seconds(
                    lambda k=kernels, f=fmt, x=x, g=given: k.fake_quantize(x, f, "search", None, *g)
                )
                report.add(f"fake {fmt.name} search {shape[0]}x{shape[1]}", moved["fake"] / seconds / copy_rate)
        master = torch.randn(shape, device="cuda")
        for fmt in formats().values():
            kernels, rule = kernels_for(x, fmt), fmt.rules[0]
            given = divisor_of(master, fmt)
            seconds = device_seconds(
                lambda k=kernels, f=fmt, r=rule, g=given: k.fake_quantize(master, f, r, torch.bfloat16, *g)  # noqa: B023
            )
            fraction = (master.nbytes + x.nbytes) / seconds / copy_rate
            report.add(f"fake {fmt.name} FP32 seen as BF16 {shape[0]}x{shape[1]}", fraction)


def fake_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """By the kernel."""
    fmt = FORMATS["mxfp4"]
    return kernels_for(x, fmt).fake_quantize(x, fmt, "floor")


def time_others(report: Report) -> None:
    """AutoRound's function and torchao's MX fake-quantizer on the same tensor, as time over a copy."""
    x = torch.randn(SHAPES[0], device="cuda").bfloat16()
    copy_seconds = device_seconds(lambda: x.clone())
    ours = device_seconds(lambda: fake_mxfp4(x))
    report.add("ours mxfp4, time over a copy", ours / copy_seconds)
    try:
        from auto_round.data_type.mxfp import quant_mx

        report.add("AutoRound eager mxfp4, time over a copy", device_seconds(lambda: quant_mx(x, 4, 32)) / copy_seconds)
    except ImportError as error:
        report.note(f"AutoRound: {error}")
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        def torchao(x: torch.Tensor) -> torch.Tensor:
            return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.bfloat16)

        different = count_different(torchao(x), fake_mxfp4(x))
        report.add("torchao, values that differ from ours", different)
        report.add("torchao eager mxfp4, time over a copy", device_seconds(lambda: torchao(x)) / copy_seconds)
        compiled = torch.compile(torchao, dynamic=False)
        report.add("torchao compiled mxfp4, time over a copy", device_seconds(lambda: compiled(x)) / copy_seconds)
    except Exception as error:  # a prototype whose interface moves
        report.note(f"torchao: {type(error).__name__}: {error}")


def time_steps(
    report: Report,
    shape: str,
    layers: int,
    batch: tuple[int, int],
    checkpointing: bool,
    compiled: bool,
    schemes: tuple[str, ...],
    repeats: int = 7,
) -> None:
    """QAT step over BF16 step, alternating; peak memory of each, from a run of its own."""
    label = f"{'compiled' if compiled else 'eager'}{', checkpointing' if checkpointing else ''}"
    steps, peaks = {}, {}
    for scheme in (None, *schemes):
        free_memory()
        model = make_model(shape, scheme, layers, "cuda", checkpointing)
        step = TrainingStep(model, make_batch(model, *batch), compiled)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        others = before - sum(p.nbytes * 3 for p in model.parameters())  # models of the schemes before this one
        peaks[scheme] = torch.cuda.max_memory_allocated() - others
        steps[scheme] = step
        del model, step
    seconds = median_seconds(steps, repeats, "cuda")
    report.add(f"BF16 step, {label}", seconds[None] * 1e3, unit="ms")
    for scheme in schemes:
        report.add(f"{scheme} step over BF16, {label}", seconds[scheme] / seconds[None], "1.10")
        report.add(
            f"{scheme} peak memory over BF16, {label}", peaks[scheme] / peaks[None], "" if checkpointing else "0.90"
        )
    report.add(f"BF16 peak memory, {label}", peaks[None] / 2**30, unit="GiB")
    if not compiled and not checkpointing and "MXFP4" in schemes:
        forward = median_seconds({scheme: step.evaluate for scheme, step in steps.items()}, repeats, "cuda")
        report.add("MXFP4 forward without gradients over BF16", forward["MXFP4"] / forward[None], "1.15")
        time_distillation(report, steps, make_model(shape, None, layers, "cuda"), repeats)
        time_fp8_step(report, steps, repeats)


def time_distillation(
    report: Report, steps: dict[str | None, TrainingStep], model: torch.nn.Module, repeats: int
) -> None:
    """A distillation step (a BF16 copy of `model` as teacher) over the BF16 step, and what chunks cost."""
    student = steps["MXFP4"]
    teacher = FrozenTeacher(load_teacher(model, None), student.model.device)
    candidates = {
        "BF16": steps[None],
        "distilled": TrainingStep(student.model, student.batch, teacher=teacher),
        "whole": TrainingStep(steps[None].model, student.batch, whole_logits=True),
    }
    candidates["distilled"].optimizer, candidates["whole"].optimizer = student.optimizer, steps[None].optimizer
    seconds = median_seconds(candidates, repeats, "cuda")
    report.add("distillation step over BF16, eager", seconds["distilled"] / seconds["BF16"], "1.45")
    report.add("BF16 step, loss in chunks over whole logits", seconds["BF16"] / seconds["whole"])


def time_fp8_forward(report: Report) -> None:
    """The MXFP4 forward product in FP8: values times power-of-two scales are exact in E4M3 within a row's range."""
    tokens, features, outputs = 8192, 4096, 14336
    x, w = (torch.randn(n, features, device="cuda").bfloat16() for n in (tokens, outputs))
    xq, wq = (fake_mxfp4(t) for t in (x, w))
    (x8, sx), (w8, sw) = to_fp8(xq), to_fp8(wq)
    exact = [float((v.float() * s == q.float()).float().mean()) for v, s, q in ((x8, sx, xq), (w8, sw, wq))]
    bf16_seconds, fp8_seconds = device_seconds(lambda: xq @ wq.t()), device_seconds(lambda: fp8_product(x8, sx, w8, sw))
    expected = xq.double() @ wq.double().t()
    errors = [
        float((y.double() - expected).norm() / expected.norm()) for y in (xq @ wq.t(), fp8_product(x8, sx, w8, sw))
    ]
    report.add("FP8 forward product over BF16, time", fp8_seconds / bf16_seconds)
    report.add("share of values exact in E4M3", min(exact))
    report.note(f"relative error of the product: BF16 {errors[0]:.2e}, FP8 {errors[1]:.2e}")


def to_fp8(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 values [n, K] -> E4M3 [n, K], and FP32 [n, 1] powers of two: the row's largest becomes 256 or 384."""
    field = q.abs().amax(-1, keepdim=True).float().view(torch.int32) >> 23
    scale = (field.clamp(min=9) - 8 << 23).view(torch.float32)
    return (q.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_product(x8: torch.Tensor, sx: torch.Tensor, w8: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    """[n, K] and [m, K] with a scale a row each -> [n, m] in BF16."""
    return torch._scaled_mm(x8, w8.t(), scale_a=sx, scale_b=sw.t(), out_dtype=torch.bfloat16, use_fast_accum=False)


def time_fp8_step(report: Report, steps: dict[str | None, TrainingStep], repeats: int) -> None:
    """The MXFP4 step with forward products in FP8, made from the rounded BF16 values by compiled code. An experiment:
    a row whose values span more than E4M3's range would lose its smallest ones.
    """
    convert = torch.compile(to_fp8, dynamic=False)

    def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = fp8_product(*convert(x.flatten(0, -2)), *convert(w)).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    def step() -> None:
        with patch.object(linear_function, "F", SimpleNamespace(linear=linear)):
            steps["MXFP4"]()

    seconds = median_seconds({"BF16": steps[None], "MXFP4": steps["MXFP4"], "FP8": step}, repeats, "cuda")
    report.add("MXFP4 step with FP8 forward products over BF16, eager", seconds["FP8"] / seconds["BF16"], "1.00")
    report.add("the same over the MXFP4 step", seconds["FP8"] / seconds["MXFP4"])


def saved_bytes(report: Report) -> None:
    """What a decoder block of 8B shape keeps for backward."""
    sizes = {}
    for scheme in (None, *SCHEMES):
        model = make_model("llama-8b", scheme, 1, "cuda")
        sizes[scheme] = saved_bytes_of_a_block(model, 2048)
        del model
        free_memory()
    for scheme in SCHEMES:
        report.add(f"bytes saved for backward by a block, {scheme} over BF16", sizes[scheme] / sizes[None], "0.85")


def free_memory() -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Run every section; one that fails is reported and does not stop the others."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where gpu.csv goes")
    parser.add_argument(
        "--layers", type=int, help="decoder layers of the 8B-shaped model; default: 6, or 2 below 100 GB"
    )
    parser.add_argument("--sections", default="check,kernels,others,saved,fp8,eager,checkpointing,compiled")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help=f"of the steps, {AT_A_TIME} at a time")
    args = parser.parse_args()
    report = Report("gpu", device="cuda")
    if args.layers is None:
        args.layers = 6 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 2
    report.add("decoder layers", args.layers)
    schemes = args.schemes.split(",")

    def steps(checkpointing: bool, compiled: bool) -> None:
        for first in range(0, len(schemes), AT_A_TIME):
            some = tuple(schemes[first : first + AT_A_TIME])
            time_steps(report, "llama-8b", args.layers, (4, 2048), checkpointing, compiled, some)
            free_memory()

    sections = {
        "check": lambda: check_kernels(report),
        "kernels": lambda: time_kernels(report),
        "others": lambda: time_others(report),
        "saved": lambda: saved_bytes(report),
        "fp8": lambda: time_fp8_forward(report),
        "eager": lambda: steps(checkpointing=False, compiled=False),
        "checkpointing": lambda: steps(checkpointing=True, compiled=False),
        "compiled": lambda: steps(checkpointing=False, compiled=True),
    }
    for name in args.sections.split(","):
        start = time.perf_counter()
        try:
            sections[name]()
        except Exception:
            report.note(f"section {name} failed:\n{traceback.format_exc()}")
        free_memory()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
    report.write(args.out)


if __name__ == "__main__":
    main()
