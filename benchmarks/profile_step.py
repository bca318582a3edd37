"""Where the time of a training step goes: BF16 and QAT side by side, by category, against the bytes' limit.

    python benchmarks/profile_step.py --scheme MXFP4 --layers 8

The limit of a category is what it must move at least (benchmarks/profile_limits.py) at the rate of a copy measured in
the same run; for products it is their operations at the rate of a large product, in FP8 where they take E4M3 values,
else in BF16. "Gaps" is the time of a step, by the clock and without the profiler, less the time in which a kernel runs.
Times of kernels are those that the profiler gives. On a CPU operators stand for kernels, of a tiny model, for a dry
run. The rows go to OUT/profile_SCHEME.csv.

Products are told apart by their shapes. With --compile and --checkpointing together, products that are recomputed count
as those of the backward pass: nothing in a compiled graph's trace tells them apart.
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

from benchmarks.profile_limits import Sizes, fp8_operations, least_bytes, operations  # noqa: E402
from benchmarks.profile_trace import Kernel, annotate, busy, named_operators, trace  # noqa: E402
from benchmarks.report import check_device, environment  # noqa: E402
from benchmarks.workloads import SHAPES, TrainingStep, make_batch, make_model, prepare  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.layers.fp8_matmul import MODES, use_fp8_matmul, why_not  # noqa: E402
from qat.schemes.presets import SCHEMES, get_scheme  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402

# Operators that move values, in the name of a compiled kernel that does nothing else.
_MOVES = "_to_copy|_unsafe_view|view|clone|expand|transpose|t|unsqueeze|squeeze|permute|slice|cat|sum"
_PRODUCT = r"^aten::(mm|addmm|bmm|baddbmm|_scaled_mm)$"
# Read from the top: the first that matches an operator, a module (in backward: that of the forward operator) or a
# kernel's name names the category. "|" separates patterns, each a regular expression.
RULES = (  # category, of operators, of modules, of the kernel
    ("optimizer", r"^Optimizer\.", "", r"FusedAdam|multi_tensor_apply"),
    ("attention", r"scaled_dot_product|_attention_|ScaledDotProduct", "", r"flash|fmha|cudnn_.*sdpa"),
    ("rope", "", r"RotaryEmbedding$", ""),
    ("product", _PRODUCT, "", r"gemm|nvjet|cutlass|cublas|xmma|^triton_tem_.*mm"),
    (
        "rounding",
        r"^mx_qat::",
        "",
        r"^_?(fake_)?(de)?quantize|^(rows|repair|merge|to_scale)_kernel|^row_kernel",
    ),
    (
        "loss",
        r"(^|: )_?(ChunkedLoss|Product|ForwardKL|CrossEntropy|SparseCrossEntropy)|^loss$|IndexBackward|aten::index$",
        r"^head$",
        r"^_(kl|ce)_(backward_)?kernel",
    ),
    ("embedding", r"embedding|^EmbeddingBackward", r"Embedding$", r"embedding"),
    ("norms", "", r"Norm$", r"fused.*(rsqrt|mean)"),
    ("silu * up", r"aten::silu", "", r"fused.*silu"),
    ("rope", r"aten::cat$|^SliceBackward|^CatBackward", "", r"fused.*(cos|sin|neg)"),
    (
        "casts and copies",
        r"aten::(_to_copy|copy_|clone|contiguous|cat)$",
        "",
        rf"^Mem(cpy|set)|fused(_({_MOVES}))+_\d+$",
    ),
    ("silu * up", "", r"MLP$", ""),
    ("rope", "", r"Attention$", ""),
    ("residual adds", r"aten::add_?$|AccumulateGrad", r"DecoderLayer$", r"fused.*add"),
    ("norms", r"evaluate_function: MulBackward0$", "", ""),  # the sum that is the gradient of a norm's weight
    ("other", "", "", ""),
)
PRODUCTS = ("products, forward", "products, backward input", "products, backward weight", "products, head")
ORDER = (*PRODUCTS, "attention", "rounding", "casts and copies", "norms", "silu * up", "rope", "residual adds",
         "embedding", "loss", "optimizer", "other", "gaps", "step")  # fmt: skip
# name -> default, for a GPU and for a CPU
DEFAULTS = {"shape": ("llama-8b", "tiny"), "layers": (4, 2), "batch": (4, 2), "length": (2048, 96), "repeats": (7, 3)}


def category_of(kernel: Kernel, tokens: int, vocabulary: int) -> str:
    """The row of a kernel, in a step of so many tokens of a model with that vocabulary."""
    for category, operators, modules, name in RULES:
        found = (
            (operators and any(re.search(operators, operator) for operator in kernel.operators))
            or (modules and any(re.search(modules, module) for module in kernel.modules[-1:]))
            or (name and re.search(name, kernel.name))
        )
        if found:
            return category if category != "product" else product_of(kernel, tokens, vocabulary)
    return "other"


def product_of(kernel: Kernel, tokens: int, vocabulary: int) -> str:
    """Which product: one with the head has the vocabulary's size, a gradient of a weight sums over tokens."""
    sizes = factors(kernel)
    if vocabulary in sizes or "head" in kernel.modules or any("ChunkedLoss" in name for name in kernel.operators):
        return "products, head"
    if not kernel.is_backward:
        return "products, forward"
    sums_over_tokens = len(sizes) == 4 and sizes[1] == tokens != sizes[0]
    return "products, backward weight" if sums_over_tokens else "products, backward input"


def factors(kernel: Kernel) -> tuple[int, ...]:
    """Sizes [M, K, K, N] of the two matrices that a product takes; () where they are not known."""
    called = [name for name in kernel.operators if re.search(_PRODUCT, name)]
    if not called:
        return ()
    first = 1 if called[-1] in ("aten::addmm", "aten::baddbmm") else 0  # the sum that the product is added to
    return tuple(size for shape in kernel.shapes[first : first + 2] for size in shape)


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


def rates(device: str) -> tuple[float, float, float]:
    """Bytes a second of a copy (read and written), operations a second of a product in BF16, and of one in FP8.

    Where a device has no products in FP8, the last is that in BF16.
    """
    count, width = (2**28, 8192) if device == "cuda" else (2**24, 512)
    x, y = (torch.zeros(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    y.copy_(x)
    copy = milliseconds(lambda: y.copy_(x), 20, device)[0] / 1e3
    products = [lambda: a @ b]
    if why_not(torch.device(device)) is None:
        ones = torch.ones(width, 1, device=device)
        e4m3 = [t.to(torch.float8_e4m3fn) for t in (a, b)]
        products.append(lambda: torch._scaled_mm(
            e4m3[0], e4m3[1].t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=False,
        ))  # fmt: skip
    found = [2 * width**3 / seconds_of(product, device) for product in products]
    return 2 * x.nbytes / copy, found[0], found[-1]


def seconds_of(product: Callable[[], object], device: str) -> float:
    """Of one call among several without a wait between them."""
    product()
    return milliseconds(lambda: [product() for _ in range(5)], 5, device)[0] / 5e3


class Profile:
    """A step of one scheme, measured; `rows` are by category: milliseconds, kernels, limit in milliseconds."""

    def __init__(self, args: argparse.Namespace, scheme: str | None) -> None:
        self.scheme, device = scheme, args.device
        model = make_model(args.shape, None, args.layers, device)
        teacher = FrozenTeacher(load_teacher(model, None), model.device) if args.distill and scheme else None
        prepare(model, scheme, args.checkpointing)
        in_fp8 = bool(scheme and use_fp8_matmul(model, args.fp8_matmul, model.device))
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
        self.sizes = sizes_of(model.config, args, scheme, teacher is not None, in_fp8)

    def category(self, kernel: Kernel) -> str:
        """See `category_of`."""
        return category_of(kernel, self.sizes.tokens, self.sizes.config.vocab_size)

    def rows(self, copy_rate: float, product_rate: float, fp8_rate: float) -> dict[str, tuple[float, int, float]]:
        """Category -> milliseconds, kernels, limit."""
        spent: Counter[str] = Counter()
        launched: Counter[str] = Counter()
        for kernel in self.kernels:
            category = self.category(kernel)
            spent[category] += kernel.duration / 1e3
            launched[category] += 1
        limits = {name: 1e3 * moved / copy_rate for name, moved in least_bytes(self.sizes).items()}
        limits |= {name: 1e3 * count / product_rate for name, count in operations(self.sizes).items()}
        in_fp8 = fp8_operations(self.sizes)
        limits["products, forward"] += 1e3 * (in_fp8 / fp8_rate - in_fp8 / product_rate)
        computing = busy(self.kernels) / 1e3 if self.peak else spent.total()  # operators of a CPU contain each other
        spent["gaps"] = self.wall - computing
        spent["step"], launched["step"] = self.wall, len(self.kernels)
        limits["step"] = sum(limits.values())
        return {name: (spent[name], launched[name], limits.get(name, 0.0)) for name in ORDER}


def sizes_of(config: LlamaConfig, args: argparse.Namespace, scheme: str | None, teacher: bool, in_fp8: bool) -> Sizes:
    """What `least_bytes` counts with."""
    spec = get_scheme(scheme).input if scheme else None
    bits = spec.format.nominal_bits if spec is not None else 0.0
    return Sizes(config, args.batch, args.length, scheme is not None, bits, args.checkpointing, teacher, in_fp8)


def show_others(profile: Profile) -> None:
    """What no rule recognized, by the time it takes."""
    spent: Counter[str] = Counter()
    for kernel in profile.kernels:
        if profile.category(kernel) == "other":
            spent[f"{kernel.name[:60]} in {' > '.join(kernel.operators[-3:])[:100]} of {kernel.modules[-1:]}"] += (
                kernel.duration / 1e3
            )
    for name, time_ in spent.most_common(6):
        print(f"  other, {profile.scheme or 'BF16'}: {time_:8.3f} ms  {name}")


def show_rounding(profile: Profile) -> None:
    """Our kernels one by one."""
    spent: Counter[tuple[str, str]] = Counter()
    launched: Counter[tuple[str, str]] = Counter()
    for kernel in profile.kernels:
        if profile.category(kernel) == "rounding":
            side = "backward" if kernel.is_backward else "forward"
            spent[side, kernel.name[:60]] += kernel.duration / 1e3
            launched[side, kernel.name[:60]] += 1
    for (side, name), time_ in spent.most_common(12):
        print(f"  rounding, {side}: {time_:8.3f} ms {launched[side, name]:5}  {name}")


def default(name: str) -> str:
    """What the help says of a default."""
    return "default: {}; on a CPU {}".format(*DEFAULTS[name])


def main() -> None:
    """Profile both steps, print the table, write the rows."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="MXFP4", choices=SCHEMES)
    parser.add_argument("--shape", choices=SHAPES, help=default("shape"))
    parser.add_argument("--layers", type=positive, help=f"decoder layers; {default('layers')}")
    parser.add_argument("--batch", type=positive, help=f"rows of a step; {default('batch')}")
    parser.add_argument("--length", type=positive, help=f"tokens of a row; {default('length')}")
    parser.add_argument("--repeats", type=positive, help=f"steps whose median is the time; {default('repeats')}")
    parser.add_argument("--fp8_matmul", choices=MODES, default="auto", help="forward products of the QAT step in FP8")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile; products and kernels have no modules")
    parser.add_argument("--distill", action="store_true", help="the QAT step learns from a BF16 copy")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV")
    args = parser.parse_args()
    check_device(args.device)
    for name, (on_gpu, on_cpu) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == "cuda" else on_cpu)
    make_model("tiny", args.scheme, 1, args.device, fp8_matmul=args.fp8_matmul)  # refused before anything is measured
    measured_rates = rates(args.device)
    copy_rate, product_rate, fp8_rate = (rate / 1e12 for rate in measured_rates)
    print(f"copy {copy_rate:.3f} TB/s, product {product_rate:.1f} TFLOP/s in BF16, {fp8_rate:.1f} in FP8", flush=True)
    tables, peaks = {}, {}
    for scheme in (None, args.scheme):
        measured = Profile(args, scheme)
        tables[scheme], peaks[scheme] = measured.rows(*measured_rates), measured.peak
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
