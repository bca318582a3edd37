"""Measure how the cost of QAT over BF16 training changes with tokens, width and depth.

    python benchmarks/scaling.py

One dimension varies at a time around a Llama of 512 hidden units, 4 layers and 1024 tokens. The cost of rounding
weights is spread over more tokens as they grow; that of rounding inputs over more outputs as layers get wider.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workloads  # noqa: E402
from benchmarks.arguments import make_parser, use_device  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402

BASE = {"tokens": 1024, "width": 512, "depth": 4}
VARIATIONS = {"tokens": (128, 512, 2048), "width": (256, 512, 1024), "depth": (2, 4, 8)}


def ratio(tokens: int, width: int, depth: int, repeats: int) -> float:
    """Time of an MXFP4 step over a BF16 step."""
    workloads.SHAPES["scaling"] = (width, 3 * width, depth, width // 64, width // 64, 2048, True)
    steps = {}
    for scheme in (None, "MXFP4"):
        model = workloads.make_model("scaling", scheme)
        steps[scheme] = workloads.TrainingStep(model, workloads.make_batch(model, tokens // 128, 128))
    seconds = median_seconds(steps, repeats)
    return seconds["MXFP4"] / seconds[None]


def draw(points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """One line for each dimension, over its multiple of the base value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in points.items():
        axis.plot(
            [x / BASE[name] for x, _ in values], [y for _, y in values], marker="o", label=f"{name} ({BASE[name]} at 1)"
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="multiple of the base value", ylabel="MXFP4 step over BF16 step")
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, report and draw."""
    args = make_parser(__doc__, repeats=7).parse_args()
    use_device()
    report, points = Report("scaling"), {}
    for name, values in VARIATIONS.items():
        points[name] = []
        for value in values:
            figure = ratio(**{**BASE, name: value}, repeats=args.repeats)
            points[name].append((value, figure))
            report.add(f"MXFP4 step over BF16, {name} {value}", figure)
    report.write(args.out)
    draw(points, args.out / "scaling.png")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
