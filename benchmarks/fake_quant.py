"""Measure the time of one fake quantization, as a multiple of copying the same tensor.

    python benchmarks/fake_quant.py --out benchmarks/results
    python benchmarks/fake_quant.py --device cuda

A copy reads a tensor once and writes it once, so its time is the limit. All candidates write to new memory, as in
training. On a CPU new memory can cost more than the copy itself; then ratios fall below 1, since our kernels ask for
large pages. So a copy into existing memory is a row of its own, and so is our time over it. Inputs are BF16, and FP32
seen as BF16: master weights, and activations under autocast. Candidates: ours (each scale rule), our specification in
plain PyTorch, AutoRound's function eager and compiled, torchao's where it is installed. One run, alternating.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks.arguments import chosen  # noqa: E402
from benchmarks.common import bar_chart, median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.numerics.families import family_of, formats, get_format  # noqa: E402
from qat.numerics.formats import Format  # noqa: E402
from qat.numerics.kernels import KERNELS  # noqa: E402
from qat.numerics.ops import tensor_divisor  # noqa: E402

VIEW = torch.bfloat16
INPUTS = {"BF16": torch.bfloat16, "FP32 seen as BF16": torch.float32}
REACH = {
    "mx_fp": "2.5",
    "nv_fp": "4",
    "int": "3",
    "fp": "3",
    "fp_token": "3",
    "fp_group": "3",
}  # times a copy, by the family's AutoRound data type
COPY, COPY_INTO = "copy", "copy into existing memory"


def kernels_for(x: torch.Tensor, fmt: Format):
    """The module of kernels that serves x's device and `fmt`."""
    for kernels in KERNELS[x.device.type]:
        if fmt.name in kernels.SERVES and kernels.is_available():
            return kernels
    raise SystemExit(f"there are no kernels of {fmt.name} for {x.device} here: see the warning above")


def divisor_of(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, ...]:
    """The divisor of x as an argument of the kernels, in formats with a tensor scale: layers give it to them."""
    return () if fmt.tensor_scale is None else (tensor_divisor([x], fmt.name, VIEW),)


def ours(x: torch.Tensor, fmt: Format) -> dict[str, Callable[[], object]]:
    """Every function of the kernels, every rule."""
    kernels, rule, given = kernels_for(x, fmt), fmt.rules[0], divisor_of(x, fmt)
    quantized = kernels.quantize(x, fmt, rule, VIEW, *given)
    calls = {f"ours, {rule}": lambda r=rule: kernels.fake_quantize(x, fmt, r, VIEW, *given) for rule in fmt.rules}
    calls["ours, quantize to bytes"] = lambda: kernels.quantize(x, fmt, rule, VIEW, *given)
    calls["ours, dequantize to BF16"] = lambda: kernels.dequantize(quantized, fmt, VIEW)
    calls["ours, dequantize to FP32"] = lambda: kernels.dequantize(quantized, fmt, torch.float32)
    return calls


def others(x: torch.Tensor, fmt: Format, report: Report) -> dict[str, Callable[[], object]]:
    """Plain PyTorch, and for MX formats AutoRound, and torchao where it is installed; what is missing is noted."""
    calls = {"plain PyTorch, eager": lambda: family_of(fmt).fake_quantize(x, fmt, fmt.rules[0], VIEW)}
    if fmt.data_type != "mx_fp":
        return calls
    try:
        from auto_round.data_type.mxfp import quant_mx
    except ImportError as error:
        report.note(f"AutoRound is left out: {error}")
    else:
        compiled = torch.compile(quant_mx, dynamic=False)
        calls["AutoRound, eager"] = lambda: quant_mx(x.to(VIEW), fmt.element.bits, fmt.block)
        calls["AutoRound, torch.compile"] = lambda: compiled(x.to(VIEW), fmt.element.bits, fmt.block)
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
    except ImportError as error:
        report.note(f"torchao is left out: {error}")
    else:
        element = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}[fmt.name]
        calls["torchao, eager"] = lambda: MXTensor.to_mx(x.to(VIEW), element, fmt.block).dequantize(VIEW)
    return calls


def measure(x: torch.Tensor, fmt: Format, rounds: int, report: Report) -> dict[str, float]:
    """Seconds by candidate; one that cannot run is noted and left out."""
    existing = torch.empty(x.shape, dtype=VIEW, device=x.device)
    candidates = {COPY: lambda: x.to(VIEW, copy=True), COPY_INTO: lambda: existing.copy_(x)}
    candidates |= ours(x, fmt)
    for name, call in others(x, fmt, report).items():
        try:
            call()
            candidates[name] = call
        except Exception as error:  # other projects' functions: prototypes, compilers
            report.note(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    return median_seconds(candidates, rounds, x.device.type)


def main() -> None:
    """Measure, print, write CSV and PNG."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=positive, default=4096, help="the tensor is SIZE x SIZE")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--formats", default=",".join(formats()), help="which of them, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the CSV and the PNG go")
    args = parser.parse_args()
    chosen_formats = [get_format(name) for name in chosen("--formats", args.formats, formats())]
    name = "fake_quant" if args.device == "cpu" else f"fake_quant_{args.device}"
    report = Report(name, args.device)
    charts = {}
    for label, dtype in INPUTS.items():
        x = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(args.device, dtype)
        for fmt in chosen_formats:
            seconds = measure(x, fmt, args.rounds, report)
            report.add(f"{label}, {fmt.name}: {COPY}", seconds[COPY] * 1e3, unit="ms")
            ratios = {candidate: value / seconds[COPY] for candidate, value in seconds.items() if candidate != COPY}
            for candidate, ratio in ratios.items():
                is_rule = candidate.removeprefix("ours, ") in fmt.rules
                reach = REACH[fmt.data_type] if is_rule else ""
                report.add(f"{label}, {fmt.name}: {candidate}", ratio, reach, "x")
            against = seconds[f"ours, {fmt.rules[0]}"] / seconds[COPY_INTO]
            report.add(f"{label}, {fmt.name}: ours over {COPY_INTO}", against, unit="x")
            charts[f"{label}, {fmt.name}"] = {k: v for k, v in ratios.items() if "bytes" not in k and "dequ" not in k}
    report.write(args.out)
    title = f"One fake quantization of {args.size} x {args.size} values"
    bar_chart(args.out / f"{name}.png", title, "time over a copy of the tensor", charts)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
