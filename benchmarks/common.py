"""What benchmarks of single operations share: alternating timing, and a bar chart of ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

SLOW_SECONDS = 0.3  # a candidate this slow is far from noise: `slow_rounds` will do


def median_seconds(
    candidates: dict[str, Callable[[], object]], rounds: int = 15, device: str = "cpu", slow_rounds: int = 3
) -> dict[str, float]:
    """Median time of each candidate, after one call to warm up.

    Candidates take turns, so that whatever slows the machine for a while slows them all; ratios stay right.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    first = {name: _seconds(run, device) for name, run in candidates.items()}  # compiles, fills caches
    first = {name: min(first[name], _seconds(run, device)) for name, run in candidates.items()}
    for round_ in range(rounds):
        for name, run in candidates.items():
            if round_ < slow_rounds or first[name] < SLOW_SECONDS:
                seconds[name].append(_seconds(run, device))
    return {name: median(times) for name, times in seconds.items()}


def _seconds(run: Callable[[], object], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    elapsed = time.perf_counter() - start
    del result  # freed outside the measured time, for every candidate alike
    return elapsed


def bar_chart(path: Path, title: str, axis: str, groups: dict[str, dict[str, float]]) -> None:
    """PNG of horizontal bars on a logarithmic axis, one panel per group, values written beside the bars.

    Panels stand four in a row, each as high as its bars need.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(groups))
    rows, bars_at_most = -(-len(groups) // columns), max(map(len, groups.values()))
    size = 6 * columns, rows * (1.5 + 0.3 * bars_at_most)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, sharex=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, (group, values) in zip(panels.flat, groups.items(), strict=False):
        names = list(values)[::-1]
        bars = panel.barh(names, [values[name] for name in names])
        panel.bar_label(bars, fmt="%.3g", padding=3)
        panel.set(title=group, xscale="log", xlabel=axis)
        panel.margins(x=0.15)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
