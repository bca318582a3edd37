"""Measure the cost of QAT over BF16 training: time of steps and evaluation, memory, bytes kept for backward.

    python benchmarks/train_step.py --shape smollm2-135m --batch 4 --length 256
    python benchmarks/train_step.py --schemes NVFP4,INT4_G32,MXFP4FP8 --no_memory

Steps of the BF16 and of the QAT model alternate in one process on the same batch, and medians are compared; of many
schemes, two at a time beside BF16. Memory is
the peak resident size of a process that trains one of the two, so it has a process for each. On a CPU it tells as
much about the C library's heap, which keeps what was freed and fragments, as about the model; so it is measured a
second time with a heap that gives large freed tensors back to the system at once, which shows what is in use.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arguments import RETURN_FREED, add_workload, chosen, make_parser, peak_memory, use_device  # noqa: E402
from benchmarks.common import bar_chart, median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import SHAPES, TrainingStep, make_batch, make_model, saved_bytes_of_a_block  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.schemes.presets import PRESETS  # noqa: E402

SCHEMES = ("MXFP4", "MXFP8")
AT_ONCE = 2  # schemes that are in memory beside BF16
BYTES = 0.85  # of a block, to be reached; other schemes:
BYTES_OF = {"NVFP4": 0.65, "MXFP4FP8": 0.70} | dict.fromkeys(
    (name for name, scheme in PRESETS.items() if scheme.input is None), 1.0
)


def schemes_of(text: str) -> tuple[str, ...]:
    """The schemes of `--schemes`."""
    return tuple(PRESETS) if text == "all" else tuple(chosen("--schemes", text, PRESETS))


def fits(scheme: str, shape: str) -> bool:
    """Whether the blocks of a scheme divide the hidden and the intermediate size of a shape."""
    specs = filter(None, (PRESETS[scheme].weight, PRESETS[scheme].input))
    return all(spec.format.fits(size) for spec in specs for size in SHAPES[shape][:2])


def print_peak_memory(args: argparse.Namespace) -> None:
    """The child of `peak_memory`: peak resident GiB of five training steps."""
    import utils  # noqa: F401  main.py loads it, and with it `datasets` (60 MiB), for both kinds of runs

    model = make_model(args.shape, None if args.memory_of == "BF16" else args.memory_of, args.layers)
    step = TrainingStep(model, make_batch(model, args.batch, args.length))
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Measure and report one shape."""
    parser = make_parser(__doc__, repeats=5)
    add_workload(parser)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="comma-separated, or all")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory, which needs 2 processes each")
    args = parser.parse_args()
    args.schemes = schemes_of(args.schemes)
    use_device()
    if args.memory_of:
        return print_peak_memory(args)

    report = Report(f"train_step_{args.shape}")
    for scheme in [name for name in args.schemes if not fits(name, args.shape)]:
        report.note(f"{scheme} is left out: its blocks do not divide the hidden size of {args.shape}")
        args.schemes = tuple(name for name in args.schemes if name != scheme)
    every = (None, *args.schemes)
    memory, in_use = {}, {}
    if not args.no_memory:
        memory = {scheme: peak_memory(args, scheme or "BF16") for scheme in every}
        in_use = {scheme: peak_memory(args, scheme or "BF16", RETURN_FREED) for scheme in every}
    figures: dict = {}
    for first in range(0, max(1, len(args.schemes)), AT_ONCE):
        figures |= measured_beside_bf16(args, args.schemes[first : first + AT_ONCE])

    bf16 = figures[None]
    report.add("BF16 step", bf16.seconds, unit="s")
    report.add("BF16 forward without gradients", bf16.forward, unit="s")
    if memory:
        report.add("BF16 peak memory of the process", memory[None], unit="GiB")
        report.add("BF16 peak memory of the process, freed memory returned", in_use[None], unit="GiB")
    for scheme in args.schemes:
        ratio = figures[scheme]
        report.add(f"{scheme} step over BF16", ratio.seconds, "1.15")
        report.add(f"{scheme} forward without gradients over BF16", ratio.forward, "1.15")
        report.add(
            f"{scheme} bytes saved for backward by a block over BF16",
            ratio.saved,
            f"{BYTES_OF.get(scheme, BYTES):.2f}",
        )
        if memory:
            report.add(f"{scheme} peak memory over BF16", memory[scheme] / memory[None], "1.00")
            report.add(f"{scheme} peak memory over BF16, freed memory returned", in_use[scheme] / in_use[None], "1.00")
    report.write(args.out)
    title = f"QAT over BF16 training: {args.shape}, {args.batch} x {args.length} tokens"
    bar_chart(args.out / f"{report.name}.png", title, "QAT / BF16", panels_of(report.rows))


def panels_of(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    """The ratios of a report by what they compare, then by scheme."""
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        scheme, _, figure = row["figure"].removesuffix(" over BF16").partition(" ")
        if not row["unit"]:
            panels.setdefault(figure, {})[scheme] = float(row["value"])
    return panels


class Figures(NamedTuple):
    """Of BF16: seconds of a step and of a forward pass, bytes that a block saves; of a scheme: the same over BF16's."""

    seconds: float
    forward: float
    saved: float


def measured_beside_bf16(args: argparse.Namespace, schemes: Sequence[str]) -> dict[str | None, Figures]:
    """The figures of some schemes over those of BF16, and BF16's own under None; their steps alternate."""
    steps = {}
    for scheme in (None, *schemes):
        model = make_model(args.shape, scheme, args.layers)
        steps[scheme] = TrainingStep(model, make_batch(model, args.batch, args.length))
    saved = {s: saved_bytes_of_a_block(step.model, args.batch * args.length) for s, step in steps.items()}
    seconds = median_seconds(steps, args.repeats)
    forward = median_seconds({scheme: step.evaluate for scheme, step in steps.items()}, args.repeats)
    found = {
        s: Figures(seconds[s] / seconds[None], forward[s] / forward[None], saved[s] / saved[None]) for s in schemes
    }
    return {None: Figures(seconds[None], forward[None], saved[None]), **found}


if __name__ == "__main__":
    with reported_in_one_line():
        main()
