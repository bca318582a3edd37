"""Plot what rows of benchmarks/accuracy.py recover against their steps, in domain and on each text.

    python benchmarks/accuracy_plot.py --csv benchmarks/results/accuracy.csv --rows plain,recipe

A line is a row at all steps that the file has of it ("recipe" and "recipe-600"): the mean over seeds, and a bar from
the lowest to the highest.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

PANELS = {
    "recovered": "in domain",
    "foreign_recovered": "package descriptions",
    "generic_recovered": "text that may be mixed in",
    "never_recovered": "text never trained on",
}


def series(lines: list[dict[str, str]], row: str, column: str) -> dict[int, list[float]]:
    """The figures of a row by steps, one for each seed."""
    found = defaultdict(list)
    for line in lines:
        if re.fullmatch(rf"{re.escape(row)}(-\d+)?(@\d+)?", line["row"]) and line.get(column):
            found[int(line["steps"])].append(float(line[column]))
    return dict(sorted(found.items()))


def plot(lines: list[dict[str, str]], rows: list[str], path: Path) -> None:
    """Write the picture.

    Raises:
        UserError: the file has nothing of a row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [column for column in PANELS if any(line.get(column) for line in lines)]
    figure, axes = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 3.6), sharey=True, squeeze=False)
    for column, axis in zip(columns, axes[0], strict=True):
        for row in rows:
            if not (found := series(lines, row, column)):
                raise UserError(f"--rows {row!r}: the file of --csv has no such row with {column}")
            means = [100 * sum(values) / len(values) for values in found.values()]
            below = [mean - 100 * min(values) for mean, values in zip(means, found.values(), strict=True)]
            above = [100 * max(values) - mean for mean, values in zip(means, found.values(), strict=True)]
            axis.errorbar(list(found), means, (below, above), marker="o", markersize=4, capsize=3, label=row)
        axis.set_xscale("log")
        ticks = sorted({steps for row in rows for steps in series(lines, row, column)})
        axis.set_xticks(ticks, [str(steps) for steps in ticks])
        axis.minorticks_off()
        axis.set_title(PANELS[column])
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss of MXFP4 recovered, %")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Read the file and write the picture beside it."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="of benchmarks/accuracy.py")
    parser.add_argument("--rows", required=True, help="names of rows without steps and seed, a line each")
    parser.add_argument("--out", type=Path, help="picture; default: beside the file")
    args = parser.parse_args(argv)
    if not args.csv.is_file():
        raise UserError(f"--csv {args.csv}: there is no such file")
    with args.csv.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    path = args.out or args.csv.with_suffix(".png")
    plot(lines, args.rows.split(","), path)
    print(f"written: {path}")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
