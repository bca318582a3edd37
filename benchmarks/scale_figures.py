"""The figures of runs at scale: from the times that processes kept, to rows of a table, to ratios of rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from qat.errors import UserError

WARM_UP = 3  # steps that are not counted
COLUMNS = (
    "run", "gpus", "stage", "shape", "layers", "row_tokens", "rows_a_gpu", "samples_a_row", "attention", "step_s",
    "tokens_s_gpu", "peak_gb", "reserved_gb", "loss_first", "loss_last", "start_s", "import_s", "data_s", "load_s",
    "prepare_s", "first_step_s", "save_s", "checkpoint_gb", "resume_s", "check_s", "restore_s", "model_s", "export_s",
    "total_s", "beside", "error",
)  # fmt: skip
_SHOWN = ("run", "tokens_s_gpu", "step_s", "peak_gb", "loss_last", "start_s", "save_s", "resume_s", "export_s", "error")


def seconds(times: dict, part: str) -> float | str:
    """How long a part of a run took; "" where it did not happen."""
    begin, end = times["parts"].get(part, (0, 0))
    return end - begin if end else ""


def figures(found: list[dict], rows: int, begin: float) -> dict:
    """The figures of a run from the times of its processes, the first process's clock.

    Args:
        rows: of a batch on a GPU.
        begin: when the launcher was started.
    """
    first = found[0]
    counted = [step[1] - step[0] for step in first["steps"][WARM_UP:]]
    between = [b[0] - a[0] for a, b in zip(first["steps"][WARM_UP:], first["steps"][WARM_UP + 1 :], strict=False)]
    step = median(between or counted)
    memory = {name: max(p["memory"].get(name, 0) for p in found) / 1e9 for name in ("allocated", "reserved")}
    loads = [seconds(first, part) or 0 for part in ("load", "check packing", "attention", "teacher", "quantize")]
    return {
        "row_tokens": first["row_tokens"], "step_s": step, "tokens_s_gpu": rows * first["row_tokens"] / step,
        "peak_gb": memory["allocated"], "reserved_gb": memory["reserved"], "loss_first": first["losses"][0],
        "loss_last": first["losses"][-1], "start_s": first["steps"][0][0] - begin,
        "import_s": first["parts"]["import"][1] - begin, "data_s": seconds(first, "data"), "load_s": sum(loads),
        "prepare_s": first["parts"]["train begins"][0] - last_before_train(first),
        "first_step_s": first["steps"][0][1] - first["steps"][0][0], "save_s": seconds(first, "save checkpoint"),
        "model_s": seconds(first, "save model"), "export_s": seconds(first, "export"),
    }  # fmt: skip


def last_before_train(times: dict) -> float:
    """When the checkpoint was looked for, the last part before the trainer is made and the model is sharded."""
    return times["parts"]["find checkpoint"][1]


def figures_resumed(found: list[dict], begin: float) -> dict:
    """The figures of a resumed run: start until its first step, the check of the checkpoint's files, reading them."""
    first = found[0]
    return {
        "resume_s": first["steps"][0][0] - begin, "check_s": seconds(first, "find checkpoint"),
        "restore_s": first["parts"]["train begins"][0] - last_before_train(first),
        "loss_last": first["losses"][-1], "model_s": seconds(first, "save model"), "export_s": seconds(first, "export"),
    }  # fmt: skip


class Table:
    """The rows of scale.csv, appended one by one."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path, self.about = path, about
        self.columns = [*COLUMNS, *about]
        self.rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
        if self.rows and list(self.rows[0]) != self.columns:
            raise UserError(f"--out: {path} has other columns than this program writes; move it away")

    def add(self, row: dict) -> None:
        """Show a row, and append it to the file."""
        row = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in (row | self.about).items()}
        self.rows.append(row)
        show(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def show_header() -> None:
    """Print the names of what `show` prints."""
    show(dict(zip(_SHOWN, _SHOWN, strict=True)))


def show(row: dict) -> None:
    """Print the most important columns of a row."""
    print(f"{row['run']:<34}" + "".join(f"{row[name]:>13}" for name in _SHOWN[1:-1]) + f"  {row['error']}", flush=True)


def ratios(rows: Iterable[dict]) -> dict[str, float]:
    """Tokens a second of a GPU: 4 GPUs over 2, MXFP4 and distillation over BF16, of rows that differ in that alone.

    A row replaces an earlier one of the same settings.
    """
    alike = ("shape", "layers", "row_tokens", "rows_a_gpu", "samples_a_row", "attention", "device")
    speed = {
        (int(row["gpus"]), row["stage"], *(row[name] for name in alike)): float(row["tokens_s_gpu"])
        for row in rows
        if row["tokens_s_gpu"]
    }
    found = {}
    for (gpus, stage, *rest), value in speed.items():
        what = f"{rest[0]}, {rest[1]} layers, {rest[2]} tokens x {rest[3]}, {rest[4]} in a row, {rest[5]}"
        if gpus == 4 and (2, stage, *rest) in speed:
            found[f"{stage}, 4 GPUs over 2 ({what})"] = value / speed[2, stage, *rest]
        if stage != "BF16" and (gpus, "BF16", *rest) in speed:
            found[f"{stage} over BF16, {gpus} GPUs ({what})"] = value / speed[gpus, "BF16", *rest]
    return found
