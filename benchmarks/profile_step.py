"""Where the time of a training step goes: BF16 and QAT side by side, by category, against the bytes' limit.

    python benchmarks/profile_step.py --scheme MXFP4 --layers 8

The limit of a category is what it must move at least (benchmarks/profile_limits.py) at the rate of a copy measured in
the same run; for products it is their operations at the rate of a large BF16 product. "Gaps" is the time of a step, by
the clock and without the profiler, less the time in which a kernel runs. Times of kernels are those that the profiler
gives. On a CPU, for a dry run, operators stand for kernels. The rows go to OUT/profile_SCHEME.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.profile_limits import Sizes, least_bytes, operations  # noqa: E402
from benchmarks.profile_trace import Kernel, annotate, busy, named_operators, trace  # noqa: E402
from benchmarks.report import environment  # noqa: E402
from benchmarks.workloads import SHAPES, TrainingStep, make_batch, make_model, prepare  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.schemes.presets import SCHEMES, get_scheme  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402

# Read from the top: the first that matches an operator, a module (in backward: that of the forward operator) or a
# kernel's name names the category. "|" separates patterns, each a regular expression.
RULES = (  # category, of operators, of modules, of the kernel
    ("optimizer", r"^Optimizer\.", "", r"FusedAdam|multi_tensor_apply"),
    ("rounding", r"^mx_qat::", "", r"^_?(fake_)?(de)?quantize|e4m3|to_fp8"),
    ("attention", r"scaled_dot_product|_attention_|ScaledDotProduct", "", r"flash|fmha|cudnn_.*sdpa"),
    ("product", r"^aten::(mm|addmm|bmm|baddbmm|_scaled_mm)$", "", r"gemm|nvjet|cutlass|cublas|xmma"),
    ("loss", r"^_?(ChunkedLoss|Product|ForwardKL|SparseCrossEntropy)", r"^head$", ""),
    ("embedding", r"embedding|^EmbeddingBackward", r"Embedding$", r"embedding"),
    ("norms", "", r"Norm$", r"fused.*(rsqrt|mean)"),
    ("silu * up", r"aten::silu", "", r"fused.*silu"),
    ("rope", r"aten::cat$|^SliceBackward|^CatBackward", r"RotaryEmbedding$", r"fused.*(cos|sin|neg)"),
    (
        "casts and copies",
        r"aten::(_to_copy|copy_|clone|contiguous|cat)$",
        "",
        r"^Mem(cpy|set)|fused__to_copy(_t)?_\d+$",
    ),
    ("silu * up", "", r"MLP$", ""),
    ("rope", "", r"Attention$", ""),
    ("residual adds", r"aten::add_?$|AccumulateGrad", r"DecoderLayer$", r"fused.*add"),
    ("other", "", "", ""),
)
PRODUCTS = ("products, forward", "products, backward input", "products, backward weight", "products, head")
ORDER = (*PRODUCTS, "attention", "rounding", "casts and copies", "norms", "silu * up", "rope", "residual adds",
         "embedding", "loss", "optimizer", "other", "gaps", "step")  # fmt: skip


def category_of(kernel: Kernel, tokens: int) -> str:
    """The row of a kernel."""
    for category, operators, modules, name in RULES:
        found = (
            (operators and any(re.search(operators, operator) for operator in kernel.operators))
            or (modules and any(re.search(modules, module) for module in kernel.modules[-1:]))
            or (name and re.search(name, kernel.name))
        )
        if found:
            return category if category != "product" else product_of(kernel, tokens)
    return "other"


def product_of(kernel: Kernel, tokens: int) -> str:
    """Which product: a gradient of a weight sums over tokens; what a compiled graph computes has no module."""
    if "head" in kernel.modules or any(re.match("_?(ChunkedLoss|Product)", name) for name in kernel.operators):
        return "products, head"
    operands = [shape for shape in kernel.shapes if len(shape) == 2]
    if len(operands) >= 2 and operands[-2][1] == tokens:
        return "products, backward weight"
    return "products, backward input" if kernel.is_backward else "products, forward"


def milliseconds(run: Callable[[], object], rounds: int, device: str) -> tuple[float, float]:
    """Medians of a call's time until the device is done, and until the call returns."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        synchronize()
        times.append((time.perf_counter() - start, returned - start))
    done, returned_after = zip(*times, strict=True)
    return 1e3 * median(done), 1e3 * median(returned_after)


def rates(device: str) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), operations a second of a BF16 product."""
    count, width = (2**28, 8192) if device == "cuda" else (2**24, 512)
    x, y = (torch.zeros(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    for run in (lambda: y.copy_(x), lambda: a @ b):
        run()
    copy = milliseconds(lambda: y.copy_(x), 20, device)[0] / 1e3
    product = milliseconds(lambda: [a @ b for _ in range(5)], 5, device)[0] / 5e3
    return 2 * x.nbytes / copy, 2 * width**3 / product


class Profile:
    """A step of one scheme, measured; `rows` are by category: milliseconds, kernels, limit in milliseconds."""

    def __init__(self, args: argparse.Namespace, scheme: str | None) -> None:
        self.scheme, device = scheme, args.device
        model = make_model(args.shape, None, args.layers, device)
        teacher = FrozenTeacher(load_teacher(model, None), model.device) if args.distill and scheme else None
        prepare(model, scheme, args.checkpointing)
        step = TrainingStep(model, make_batch(model, args.batch, args.length), args.compile, teacher)
        for _ in range(3):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.wall, self.host = milliseconds(step, args.repeats, device)
        self.peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        if args.compile:
            self.kernels = trace(step, device)
        else:
            for module in (model, *([] if teacher is None else [teacher.body])):
                annotate(module)
            with named_operators():
                self.kernels = trace(step, device)
        self.sizes = sizes_of(model.config, args, scheme, teacher is not None)

    def rows(self, copy_rate: float, product_rate: float) -> dict[str, tuple[float, int, float]]:
        """Category -> milliseconds, kernels, limit."""
        spent: Counter[str] = Counter()
        launched: Counter[str] = Counter()
        for kernel in self.kernels:
            category = category_of(kernel, self.sizes.tokens)
            spent[category] += kernel.duration / 1e3
            launched[category] += 1
        limits = {name: 1e3 * moved / copy_rate for name, moved in least_bytes(self.sizes).items()}
        limits |= {name: 1e3 * count / product_rate for name, count in operations(self.sizes).items()}
        computing = busy(self.kernels) / 1e3 if self.peak else spent.total()  # operators of a CPU contain each other
        spent["gaps"] = self.wall - computing
        spent["step"], launched["step"] = self.wall, len(self.kernels)
        limits["step"] = sum(limits.values())
        return {name: (spent[name], launched[name], limits.get(name, 0.0)) for name in ORDER}


def sizes_of(config: LlamaConfig, args: argparse.Namespace, scheme: str | None, teacher: bool) -> Sizes:
    """What `least_bytes` counts with."""
    spec = get_scheme(scheme).input if scheme else None
    bits = spec.format.nominal_bits if spec is not None else 0.0
    return Sizes(config, args.batch, args.length, scheme is not None, bits, args.checkpointing, teacher)


def show_others(profile: Profile) -> None:
    """What no rule recognized, by the time it takes."""
    spent: Counter[str] = Counter()
    for kernel in profile.kernels:
        if category_of(kernel, profile.sizes.tokens) == "other":
            spent[f"{kernel.name[:60]} in {' > '.join(kernel.operators[-3:])[:100]} of {kernel.modules[-1:]}"] += (
                kernel.duration / 1e3
            )
    for name, time_ in spent.most_common(6):
        print(f"  other, {profile.scheme or 'BF16'}: {time_:8.3f} ms  {name}")


def show_rounding(profile: Profile) -> None:
    """Our kernels one by one."""
    spent, launched = Counter(), Counter()
    for kernel in profile.kernels:
        if category_of(kernel, profile.sizes.tokens) == "rounding":
            side = "backward" if kernel.is_backward else "forward"
            spent[side, kernel.name[:60]] += kernel.duration / 1e3
            launched[side, kernel.name[:60]] += 1
    for (side, name), time_ in spent.most_common(12):
        print(f"  rounding, {side}: {time_:8.3f} ms {launched[side, name]:5}  {name}")


def main() -> None:
    """Profile both steps, print the table, write the rows."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="MXFP4", choices=SCHEMES)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=positive, default=4, help="decoder layers")
    parser.add_argument("--batch", type=positive, default=4, help="rows of a step")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a row")
    parser.add_argument("--repeats", type=positive, default=7, help="steps whose median is the time of a step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile; products and kernels have no modules")
    parser.add_argument("--distill", action="store_true", help="the QAT step learns from a BF16 copy")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV")
    args = parser.parse_args()
    copy_rate, product_rate = rates(args.device)
    print(f"copy {copy_rate / 1e12:.3f} TB/s, BF16 product {product_rate / 1e12:.1f} TFLOP/s", flush=True)
    tables, peaks = {}, {}
    for scheme in (None, args.scheme):
        measured = Profile(args, scheme)
        tables[scheme], peaks[scheme] = measured.rows(copy_rate, product_rate), measured.peak
        name = scheme or "BF16"
        print(
            f"{name}: {measured.wall:.1f} ms, until the call returns {measured.host:.1f}, peak {measured.peak:.2f} GiB"
        )
        show_rounding(measured)
        show_others(measured)
        del measured
        gc.collect()
        torch.cuda.empty_cache()
    write(args, tables)


def write(args: argparse.Namespace, tables: dict) -> None:
    """The table, and its rows as CSV."""
    columns = [f"{what} {of}" for of in ("BF16", args.scheme) for what in ("ms", "kernels", "limit ms", "share")]
    print(f"\n{'category':<26}" + "".join(f"{column:>17}" for column in columns))
    rows = []
    for name in ORDER:
        values: list[str] = []
        for table in tables.values():
            spent, launched, limit = table[name]
            known = limit > 0 and spent > 0
            values += [f"{spent:.3f}", str(launched), f"{limit:.3f}" if limit else "",
                       f"{limit / spent:.2f}" if known else ""]  # fmt: skip
        rows.append({"category": name, **dict(zip(columns, values, strict=True))})
        print(f"{name:<26}" + "".join(f"{value:>17}" for value in values))
    about = environment(args.device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"profile_{args.scheme}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["category", *columns, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
