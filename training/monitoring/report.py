"""Write the report of a training run: `report.md` with final figures and settings, `report.png` with curves.

Everything comes from the Trainer's log history, which is also what checkpoints keep, so a resumed run reports the whole
of itself, and a callback that logs a figure finds it drawn. Figures whose names differ in "eval_" or after a slash
share a panel: `loss` and `eval_loss` (where both are cross-entropies; else `ce` and `eval_loss`), `saturated/mlp` and
`saturated/attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

_NOT_CURVES = ("step", "epoch", "total_flos", "eval_model_preparation_time")  # axes, and what is no scalar of its step
_TOTALS = ("runtime", "samples_per_second", "steps_per_second")  # ends of names that speak of a whole run
_ORDER = ("loss", "kl", "perplexity", "learning_rate", "grad_norm")
_COUNTS = ("labelled_tokens",)  # in a table, not in a panel
_LOGARITHMIC = ("perplexity", "grad_norm")
_MANY = 8  # lines in a panel that a legend can still tell apart

Curves = dict[str, list[tuple[int, float]]]


def write_report(folder: str | Path, log_history: list[dict], settings: dict[str, object], title: str) -> Path:
    """Write `report.md` into `folder`, and `report.png` where there was a step; returns the path of the former.

    Args:
        log_history: `trainer.state.log_history`.
        settings: by name, what the run was asked to do.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves = collect_curves(log_history)
    lines = [f"# {title}", ""]
    if any(step > 0 for points in curves.values() for step, _ in points):
        _draw(folder / "report.png", curves, title)
        lines += ["![curves](report.png)", ""]
    lines += ["## Figures", ""]
    lines += _table(("figure", "first", "last", "best", "at step"), _figures(curves))
    lines += ["", "## Run", "", *_table(("", ""), _totals(log_history)), "", "## Settings", ""]
    lines += _table(("", ""), [(name, f"`{value}`") for name, value in settings.items() if value is not None])
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def report_run(folder: str | Path, trainer, groups: Sequence) -> Path:
    """`write_report` of a finished training, or of a post-training quantization.

    Args:
        trainer: a QATTrainer.
        groups: dataclasses of arguments.
    """
    settings = run_settings(trainer, *(group for group in groups if group is not trainer.args))
    title = "Training report" if trainer.args.do_train else "Post-training quantization"
    return write_report(folder, trainer.state.log_history, settings, title)


def collect_curves(log_history: list[dict]) -> Curves:
    """Every scalar logged with a step, as (step, value) in order of steps; the last value of a step counts."""
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if _is_number(value) and "step" in entry and name not in _NOT_CURVES and not _is_total(name):
                found.setdefault(name, {})[entry["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def run_settings(trainer, *groups) -> dict[str, object]:
    """The settings that the report lists: scheme and rules, and the arguments that differ from their defaults.

    Those of a training's steps are listed where there was one.

    Args:
        groups: dataclasses of arguments.
    """
    args, config = trainer.args, trainer.qat_config
    settings: dict[str, object] = {}
    for group in groups:
        given = {f.name: getattr(group, f.name) for f in fields(group) if f.default is not MISSING}
        settings |= {f.name: given[f.name] for f in fields(group) if f.name in given and given[f.name] != f.default}
    for scheme, rules in (config.scale_rules if config else {}).items():
        settings[f"scale rules of {scheme}"] = f"weights {rules['weight']}, inputs {rules['input'] or 'not quantized'}"
    settings["quantization"] = config.summary if config else "none"
    if not trainer.state.global_step:
        return settings
    processes = trainer.accelerator.num_processes
    batch = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {processes} processes"
    return settings | {
        "samples in a step": batch, "model_max_length": getattr(args, "model_max_length", None), "seed": args.seed,
        "learning_rate": args.learning_rate, "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", "")),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
    }  # fmt: skip


# ---- Tables ----


def _figures(curves: Curves) -> list[tuple[str, ...]]:
    """First and last value of each curve, and the lowest with its step where low is good."""
    rows = []
    for name in sorted(curves, key=lambda n: (_rank(n), n)):
        points = curves[name]
        step, lowest = min(points, key=lambda point: point[1] if not math.isnan(point[1]) else math.inf)
        has_best = _base(name) in ("loss", "kl", "perplexity")
        best = (_number(lowest), str(step)) if has_best else ("", "")
        rows.append((name, _number(points[0][1]), _number(points[-1][1]), *best))
    return rows


def _totals(log_history: list[dict]) -> list[tuple[str, str]]:
    steps = max((entry["step"] for entry in log_history if "step" in entry), default=0)
    totals = {"steps": str(steps)}
    for entry in log_history:
        if "labelled_tokens" in entry:
            totals["labelled tokens"] = f"{entry['labelled_tokens']:,}"
        if "epoch" in entry:
            totals["epochs"] = _number(entry["epoch"])
        if "train_runtime" in entry:
            totals["training time since the last start"] = f"{entry['train_runtime']:,.0f} s"
            totals["training samples a second"] = _number(entry["train_samples_per_second"])
        if "eval_runtime" in entry:
            totals["time of the last evaluation"] = f"{entry['eval_runtime']:,.1f} s"
    return list(totals.items())


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + " --- |" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def _number(value: float) -> str:
    return f"{value:.4g}"


# ---- Curves ----


def _draw(path: Path, curves: Curves, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[str]] = {}
    for name in sorted(curves, key=lambda n: (_rank(n), n)):
        if name not in _COUNTS:
            distilled = name == "loss" and not curves.keys().isdisjoint(("kl", "eval_kl"))  # not what eval_loss is
            groups.setdefault("training loss" if distilled else _base(name), []).append(name)
    columns = min(3, len(groups)) or 1
    rows = math.ceil(len(groups) / columns) or 1
    figure, panels = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, (base, names) in zip(panels.flat, groups.items(), strict=False):
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            few = len(steps) < 20 or name.startswith("eval_")
            panel.plot(steps, values, marker="o" if few else None, markersize=3, linewidth=1.2, label=name)
        panel.set(title=base.replace("_", " "), xlabel="step")
        panel.grid(alpha=0.3)
        values = [value for name in names for _, value in curves[name]]
        if base in _LOGARITHMIC and 0 < 20 * min(values) < max(values):
            panel.set_yscale("log")
        if 1 < len(names) <= _MANY or names != [base]:
            panel.legend(fontsize="small")
    figure.suptitle(title, y=0.995)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _base(name: str) -> str:
    """The panel of a figure: "eval_loss", "train_loss" and "ce" belong to "loss", "saturated/mlp" to "saturated"."""
    return "loss" if name == "ce" else name.removeprefix("eval_").removeprefix("train_").partition("/")[0]


def _rank(name: str) -> int:
    return _ORDER.index(_base(name)) if _base(name) in _ORDER else len(_ORDER)


def _is_total(name: str) -> bool:
    return name.endswith(_TOTALS) or name.startswith("train_")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
