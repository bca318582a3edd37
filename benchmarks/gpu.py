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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks.arguments import chosen  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.fake_quant import divisor_of, kernels_for  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.variants import BF16, Variants  # noqa: E402
from benchmarks.workloads import make_batch, make_model, saved_bytes_of_a_block  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.numerics import e4m3_rows, ops  # noqa: E402
from qat.numerics.families import family_of, formats  # noqa: E402
from qat.numerics.kernels import triton_rows  # noqa: E402
from qat.numerics.mx import FORMATS  # noqa: E402
from qat.schemes.presets import INPUT_TRANSFORMS, PRESETS  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402

MXFP4 = FORMATS["mxfp4"]
SHAPES = ((8192, 8192), (4096, 14336))
STEPS = {"eager", "checkpointing", "compiled"}  # sections of training steps
SCHEMES = ("MXFP4", "MXFP8", "FP8", "MXFP4A16", "MXFP8A16", "MXFP4FP8", "MXFP4FP8_G128", "MXFP4MXFP8", "NVFP4",
           "NVFP4A16", "INT4_G32", "INT4_G128")  # fmt: skip


def device_seconds(run: Callable[[], object], milliseconds: int = 100) -> float:
    """Median time of `run` on the device, its L2 cache cold, launches hidden: by Triton's own bench."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=milliseconds, return_mode="median") / 1e3


def graph_seconds(run: Callable[[], object]) -> float:
    """Median time of `run` on the device alone: recorded as a graph, without the processor's part."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()  # it uses a stream that does not wait for the one on which tensors are made
    return do_bench_cudagraph(run, rep=50, return_mode="median") / 1e3


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
    return kernels_for(x, MXFP4).fake_quantize(x, MXFP4, "floor")


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
    scheme: str,
    input_transform: str | None = None,
    repeats: int = 7,
) -> None:
    """QAT step over BF16 step, alternating, and peak memory of each."""
    label = f"{'compiled' if compiled else 'eager'}{', checkpointing' if checkpointing else ''}"
    label += f", {input_transform} inputs" if input_transform else ""
    model = make_model(shape, scheme, layers, "cuda", checkpointing, input_transform=input_transform)
    variants = Variants(model, scheme, make_batch(model, *batch), compiled)
    if not compiled and not checkpointing and scheme == "MXFP4":
        teacher = FrozenTeacher(load_teacher(make_model(shape, None, layers, "cuda"), None), model.device)
        variants.add("distilled", teacher=teacher)
        variants.add("whole", whole_logits=True)
    runs = {name: variants.run(name) for name in variants.names}
    others = {"distilled": scheme, "whole": BF16}
    runs |= {name: variants.run(name, of) for name, of in others.items() if name in variants.steps}
    peaks = {name: peak_of(run) for name, run in runs.items()}
    lost = int(ops.lost_rows(model.device))
    seconds = median_seconds(runs, repeats, "cuda")
    report.add(f"BF16 step, {label}", seconds[BF16] * 1e3, unit="ms")
    report.add(f"BF16 peak memory, {label}", peaks[BF16] / 2**30, unit="GiB")
    for name in variants.names[1:]:
        report.add(f"{name} step over BF16, {label}", seconds[name] / seconds[BF16], "0.95")
        report.add(f"{name} peak memory over BF16, {label}", peaks[name] / peaks[BF16])
    report.add(f"{scheme}, lost rows in these steps, {label}", int(ops.lost_rows(model.device)) - lost)
    if "distilled" in runs:
        report.add(f"distillation step over BF16, {label}", seconds["distilled"] / seconds[BF16], "1.20")
        report.add(f"BF16 step, loss in chunks over whole logits, {label}", seconds[BF16] / seconds["whole"])
        forward = median_seconds({name: variants.forward(name) for name in variants.names}, repeats, "cuda")
        for name in variants.names[1:]:
            report.add(f"{name} forward without gradients over BF16, {label}", forward[name] / forward[BF16])


def peak_of(run: Callable[[], None]) -> int:
    """The peak of allocated memory in a step, after two others."""
    run()
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def check_rows(report: Report) -> None:
    """E4M3 rows against their specification on the CPU, and products with lost rows against sums in FP64."""
    differ = 0
    for rule in MXFP4.rules:
        for x in (random_rows(512, 1056).bfloat16(), random_rows(512, 4096), random_rows(64, 20000)):
            with torch.no_grad():
                (rows, codes), (expected, codes_expected) = (
                    ops.to_rows(y, MXFP4.name, rule, torch.bfloat16, with_codes=True) for y in (x.cuda(), x)
                )
            holds = expected.lost == 0
            pairs = [(rows.values.cpu()[holds], expected.values[holds]), (rows.scale.cpu(), expected.scale)]
            pairs += [(rows.lost.cpu(), expected.lost)]
            pairs += [(a.cpu(), b) for a, b in zip(codes.tensors, codes_expected.tensors, strict=True)]
            differ += sum(count_different(a, b) for a, b in pairs)
    report.add("E4M3 rows, elements that differ from plain PyTorch", differ, "0")


def random_rows(rows: int, columns: int) -> torch.Tensor:
    """FP32, with blocks of many magnitudes, zeros, a NaN, an infinity, tiny and huge rows."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-9, 9, (rows, columns // 32), generator=generator).float()
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(exponents).repeat_interleave(32, 1)
    x[3], x[4, :32], x[5, 7], x[6, 70] = 0, 0, torch.nan, torch.inf
    x[7] *= 1e-38
    x[8] *= 1e36
    return x


@torch.no_grad()
def time_fp8_forward(report: Report) -> None:
    """Forward products in FP8 with all that belongs to them, and in BF16; E4M3 rows as a fraction of a copy's rate."""
    check_rows(report)
    for tokens, features, outputs in ((8192, 4096, 14336), (8192, 14336, 4096), (8192, 4096, 4096)):
        size = f"{tokens}x{features}x{outputs}"
        x, w = torch.randn(tokens, features, device="cuda").bfloat16(), torch.randn(outputs, features, device="cuda")
        time_rows(report, x, w)
        rows = [ops.to_rows(t, MXFP4.name, rule, torch.bfloat16)[0] for t, rule in ((x, "even"), (w, "search"))]
        values = [e4m3_rows.rounded(r) for r in rows]
        bf16 = device_seconds(lambda v=values: v[0] @ v[1].t())
        fp8 = device_seconds(lambda r=rows: ops.rows_product(*r, None))
        report.add(f"FP8 product over BF16, time, {size}", fp8 / bf16)
        report.add(f"looking for lost rows over the BF16 product, {size}", repair_seconds(rows) / bf16)
        for lost in (4, tokens // 16):
            rows[0].lost.fill_(0)
            rows[0].lost[:: tokens // lost] = 1
            report.add(f"repairing {lost} lost rows over the BF16 product, {size}", repair_seconds(rows) / bf16)
        for outliers in (False, True):
            errors_of_products(report, x, w, outliers, size)


def repair_seconds(rows: list) -> float:
    out = torch.empty(rows[0].values.shape[0], rows[1].values.shape[0], dtype=torch.bfloat16, device="cuda")
    return graph_seconds(lambda: triton_rows.repair(out, *rows, None))


def time_rows(report: Report, x: torch.Tensor, w: torch.Tensor) -> None:
    """The conversion of inputs, BF16, with codes and without, and of weights, FP32."""
    target = torch.empty_like(x)
    copy_rate = 2 * x.nbytes / graph_seconds(lambda: target.copy_(x))
    for tensor, rule, with_codes in ((x, "even", True), (x, "even", False), (w, "floor", False), (w, "search", False)):
        moved = tensor.nbytes + tensor.numel() * (1 + (0.5 + 1 / 32) * with_codes)
        seconds = graph_seconds(lambda t=tensor, r=rule, c=with_codes: ops.to_rows(t, MXFP4.name, r, torch.bfloat16, c))
        what = f"{tensor.shape[0]}x{tensor.shape[1]} {str(tensor.dtype).removeprefix('torch.')}"
        report.add(f"E4M3 rows{', codes' * with_codes}, {what}, {rule}", moved / seconds / copy_rate, "0.85")


def errors_of_products(report: Report, x: torch.Tensor, w: torch.Tensor, outliers: bool, size: str) -> None:
    """The relative error of products in BF16 and FP8, both rounded to BF16 at the end; with fast accumulation too."""
    x, w = x[:2048].clone(), w[:2048] * 0.02
    if outliers:
        x[:, ::97] *= 60
        x[:, 5] *= 1000
        w[:, ::53] *= 8
    rows = [ops.to_rows(t, MXFP4.name, rule, torch.bfloat16)[0] for t, rule in ((x, "even"), (w, "search"))]
    values = [e4m3_rows.rounded(r) for r in rows]
    exact = values[0].double() @ values[1].double().t()
    fast = torch._scaled_mm(
        rows[0].values, rows[1].values.t(), scale_a=rows[0].scale, scale_b=rows[1].scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    products = {"BF16": values[0] @ values[1].t(), "FP8": ops.rows_product(*rows, None), "FP8, fast accumulation": fast}
    for name, product in products.items():
        error = float((product.double() - exact).norm() / exact.norm())
        report.add(f"relative error in 1/1000, {name}, {size}{', outliers' * outliers}", error * 1e3)


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
    parser.add_argument("--layers", type=positive, default=8, help="decoder layers of the 8B-shaped model")
    parser.add_argument("--sections", default="check,kernels,others,saved,fp8,eager,checkpointing,compiled")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="of the steps")
    parser.add_argument("--input_transform", choices=INPUT_TRANSFORMS, help="of the steps; default: none")
    args = parser.parse_args()
    schemes = chosen("--schemes", args.schemes, PRESETS)
    if args.input_transform and not STEPS & set(args.sections.split(",")):
        raise UserError(f"--input_transform is of steps, so --sections needs one of {', '.join(sorted(STEPS))}")
    report = Report("gpu", device="cuda")
    report.add("decoder layers", args.layers)

    def steps(checkpointing: bool, compiled: bool) -> None:
        for scheme in schemes:
            batch, transform = (4, 2048), args.input_transform
            time_steps(report, "llama-8b", args.layers, batch, checkpointing, compiled, scheme, transform)
            torch._dynamo.reset()
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
    for name in chosen("--sections", args.sections, sections):
        start = time.perf_counter()
        try:
            sections[name]()
        except Exception:
            report.note(f"section {name} failed:\n{traceback.format_exc()}")
        free_memory()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
