"""Where the time of a training step goes: matrix products, and all else against the bytes that it must move.

    python benchmarks/profile_step.py                       # a GPU, 8B shape, 8 layers, 4 x 2,048 tokens
    python benchmarks/profile_step.py --device cpu --shape smollm2-135m --layers 2 --batch 2 --length 128

A BF16 step and a QAT step of one model are profiled by torch.profiler. Kernels are sorted into kinds by their names; on
a CPU, operators are. The limit of a kind is the least number of bytes that it has to read and write, over the rate of a
copy in the same run. Times overlap nowhere: a GPU runs the kernels of one stream one after the other.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import environment  # noqa: E402
from benchmarks.variants import Variants  # noqa: E402
from benchmarks.workloads import SHAPES, make_batch, make_model  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.layers.fp8_matmul import linear_products  # noqa: E402

PRODUCTS, ROUNDING, OTHER, IDLE = "matrix products", "rounding", "other", "idle"
# The first pattern that a kernel's name matches decides.
KINDS = (
    (PRODUCTS, r"nvjet|gemm|cutlass.*(gemm|mm)|aten::(mm|addmm|bmm|_scaled_mm)$"),
    ("attention", r"flash|sdpa|attention|fmha"),
    ("optimizer", r"multi_tensor_apply|FusedOptimizer|adam|aten::_fused"),
    (ROUNDING, r"rows_kernel|quantize_kernel|repair_kernel|merge_kernel|row_kernel|mx_qat::"),
    ("casts and copies", r"copy|Memcpy|Memset|fill|CatArray|aten::(copy_|cat|fill_|zero_)$"),
    ("softmax and loss", r"[Ss]oft[Mm]ax|nll|gather|scatter|logsumexp|topk|sort"),
    ("sums and means", r"reduce_kernel|aten::(sum|mean)$"),
    ("products and sums of elements", r"elementwise|aten::(mul|add|add_|mul_|silu|silu_backward|pow|rsqrt|neg|div)_?$"),
    ("embedding", r"embedding|index|indexing"),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the bytes of a kind follow from.

    Attributes:
        parameters, linear: values of all parameters, and of quantized weights.
        tokens, hidden, intermediate, layers: of the batch and the model.
    """

    parameters: int
    linear: int
    tokens: int
    hidden: int
    intermediate: int
    layers: int

    @property
    def inputs(self) -> int:
        """Values that are rounded: the inputs of q/k/v, o, gate/up and down."""
        return self.layers * self.tokens * (3 * self.hidden + self.intermediate)

    def limits(self, in_fp8: bool) -> dict[str, tuple[int, int]]:
        """The least bytes by kind, of the BF16 step and of the QAT step.

        optimizer: parameter, gradient and both moments are read, all but the gradient written, FP32. rounding: each
        weight twice, from FP32 to BF16 (FP8 forward: one byte), each input once, FP32 or BF16 (counted as BF16), to
        codes of 4.25 bits and values, and codes once more to BF16 values. casts: of weights, FP32 to BF16, and of
        their gradients back.
        """
        of_weights = self.linear * ((4 + 1 if in_fp8 else 4 + 2) + 4 + 2)
        of_inputs = self.inputs * ((2 + 1 if in_fp8 else 2 + 2) + 2 * 17 / 32 + 2)
        return {
            "optimizer": (28 * self.parameters, 28 * self.parameters),
            ROUNDING: (0, int(of_weights + of_inputs)),
            "casts and copies": (12 * self.linear, 0),
        }


def main() -> None:
    """Profile, print the table, write profile_SCHEME.csv."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="llama-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scheme", default="MXFP4")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model = make_model(args.shape, args.scheme, args.layers, args.device, args.checkpointing)
    variants = Variants(model, args.scheme, make_batch(model, args.batch, args.length))
    names = variants.names[:2]
    seconds = median_seconds({name: variants.run(name) for name in names}, 5, args.device)
    found = [times_of(variants.run(name), args.device) for name in names]
    sizes = Sizes(
        sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear_products(model).values()),
        args.batch * args.length, model.config.hidden_size, model.config.intermediate_size, args.layers,
    )  # fmt: skip
    rows = table(found, [seconds[name] for name in names], sizes.limits(variants.in_fp8), copy_rate(args.device))
    show(rows, names)
    write(rows, names, args)


def times_of(run: Callable[[], None], device: str) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of kernels of one call, by their names; of operators on a CPU."""
    run()
    kind, on = (ProfilerActivity.CUDA, DeviceType.CUDA) if device == "cuda" else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[kind]) as profiled:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    times: dict[str, tuple[float, int]] = {}
    for event in profiled.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if event.device_type == on and own > 0:
            times[event.key] = own / 1e3, event.count
    return times


def kind_of(name: str) -> str:
    """The kind of a kernel or an operator."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def table(
    found: list[dict[str, tuple[float, int]]], steps: list[float], limits: dict[str, tuple[int, int]], rate: float
) -> list[dict]:
    """A row for each kind: milliseconds, kernels and the limit in milliseconds of both steps.

    Args:
        found: of `times_of`; steps: seconds; rate: bytes a second.
    """
    sums: list[dict[str, list[float]]] = []
    for times, step in zip(found, steps, strict=True):
        by_kind: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for name, (milliseconds, count) in times.items():
            by_kind[kind_of(name)][0] += milliseconds
            by_kind[kind_of(name)][1] += count
        by_kind[IDLE] = [max(0.0, step * 1e3 - sum(ms for ms, _ in by_kind.values())), 0]
        sums.append(by_kind)
    kinds = [kind for kind, _ in KINDS] + [OTHER, IDLE]
    return [
        {
            "kind": kind,
            **{f"ms_{i}": round(sums[i][kind][0], 2) for i in (0, 1)},
            **{f"kernels_{i}": int(sums[i][kind][1]) for i in (0, 1)},
            **{f"limit_ms_{i}": round(limits.get(kind, (0, 0))[i] / rate * 1e3, 2) for i in (0, 1)},
        }
        for kind in kinds
        if sums[0][kind][0] or sums[1][kind][0]
    ]


def copy_rate(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.randn(1 << 26 if device == "cuda" else 1 << 23, device=device).bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds({"copy": lambda: target.copy_(source)}, 9, device)["copy"]


def show(rows: list[dict], names: list[str]) -> None:
    """Print the table."""
    print(f"{'kind':<32}" + "".join(f"{f'{name}, ms':>14}{'kernels':>9}{'limit':>8}" for name in names))
    for row in rows:
        cells = (f"{row[f'ms_{i}']:>14.2f}{row[f'kernels_{i}']:>9}{row[f'limit_ms_{i}']:>8.2f}" for i in (0, 1))
        print(f"{row['kind']:<32}" + "".join(cells))


def write(rows: list[dict], names: list[str], args: argparse.Namespace) -> None:
    """profile_SCHEME.csv, with the columns named after the steps."""
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment(args.device)

    def named(row: dict) -> dict:
        return {re.sub(r"_([01])$", lambda m: f" {names[int(m[1])]}", key): value for key, value in row.items()}

    path = args.out / f"profile_{args.scheme.lower()}_{args.device}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*named(rows[0]), *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**named(row), **about} for row in rows)


if __name__ == "__main__":
    main()
