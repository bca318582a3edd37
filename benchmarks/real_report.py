"""The table of real models: what each row gains back, how seeds differ, and what its training took."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.real_rows import ALL, is_row, row_of
from benchmarks.report import write_text
from benchmarks.tasks.divergence import ANSWERS
from benchmarks.tasks.texts import TEXTS

_COLUMNS = (
    "row", "title", "figure", "value", "error", "kl", "count", "steps", "tokens", "train_minutes", "data", "baseline",
    "device", "threads", "versions", "date", "command",
)  # fmt: skip
BASELINE, FLOOR = "bf16", "mxfp4-rtn"
LEGEND = (
    "Tasks in % +- standard error; texts in bits per byte (KL); answers of the BF16 model in KL. After the slash: "
    "recovered, the part of the loss of "
    "the first rounded row that a row gains back. Minutes are those of main.py on the device of the CSV file."
)


def read_json(path: Path) -> dict:
    """What a file holds; {} where it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def lines(out: Path, rows: Sequence[str], figures: Sequence[str]) -> list[str]:
    """The table: a line for each row, and one for each row that was trained with several seeds."""
    found = {key: _figures(out, key, figures) for key in dict.fromkeys((*rows, BASELINE, FLOOR))}
    table = []
    for key in rows:
        cells = [_cell(figure, result, found) for figure, result in found[key].items()]
        cells += _training(read_json(out / "rows" / key / "trained.json"))
        table.append(f"{row_of(key).title}: {'; '.join(cells) or 'not measured'}")
    for name in dict.fromkeys(key.partition("@")[0] for key in rows if "@" in key):
        table += _of_seeds(name, [found[key] for key in rows if key.partition("@")[0] == name], figures)
    return table


def write_csv(out: Path, figures: Sequence[str]) -> None:
    """Write `out/real_models.csv`: a line for each figure that is there, of the rows of today, in their order."""
    keys = [path.name for path in (out / "rows").iterdir() if is_row(path.name)]
    keys.sort(key=lambda key: (ALL.index(key), key) if key in ALL else (len(ALL), key))
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for key in keys:
        about = read_json(out / "rows" / key / "trained.json")
        for figure, result in _figures(out, key, figures).items():
            line = {"row": key, "title": row_of(key).title, "figure": figure, **about, **result}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    write_text(out / "real_models.csv", text.getvalue())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean of several seeds, and their standard deviation."""
    return mean(values), stdev(values)


def recovered(value: float, floor: float, best: float) -> float:
    """The part of the way from `floor` to `best` that `value` has gone; NaN where there is no way to go."""
    return (value - floor) / (best - floor) if best != floor else math.nan


def _figures(out: Path, key: str, figures: Sequence[str]) -> dict[str, dict]:
    read = {figure: read_json(out / "rows" / key / f"{figure}.json") for figure in figures}
    return {figure: result for figure, result in read.items() if result}


def _cell(figure: str, result: dict, found: dict[str, dict]) -> str:
    best, floor = (found[key].get(figure) for key in (BASELINE, FLOOR))
    part = f" / {recovered(result['value'], floor['value'], best['value']):.0%}" if best and floor else ""
    if figure in ANSWERS:
        return f"{figure} {result['value']:.4f} +- {result['error']:.4f}{part}"
    if figure in TEXTS:
        return f"{figure} {result['value']:.4f} ({result['kl']:.4f}){part}"
    return f"{figure} {100 * result['value']:.1f} +- {100 * result['error']:.1f}{part}"


def _training(about: dict) -> list[str]:
    if not about:
        return []
    return [f"{about['steps']} steps, {about['tokens']:,} tokens, {about['train_minutes']:.1f} minutes"]


def _of_seeds(name: str, results: list[dict[str, dict]], figures: Sequence[str]) -> list[str]:
    cells = []
    for figure in figures:
        values = [result[figure]["value"] for result in results if figure in result]
        if len(values) > 1:
            (middle, deviation), is_text = spread(values), figure in (*TEXTS, *ANSWERS)
            shown = f"{middle:.4f} +- {deviation:.4f}" if is_text else f"{100 * middle:.1f} +- {100 * deviation:.1f}"
            cells.append(f"{figure} {shown} ({len(values)} seeds)")
    return [f"{row_of(name).title}, mean and standard deviation over seeds: {'; '.join(cells)}"] if cells else []
