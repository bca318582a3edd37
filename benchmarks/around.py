"""Measure what surrounds the steps of a run of main.py: seconds from start to exit by phase, over the model's size.

    python benchmarks/around.py                                     # two small shapes on a CPU, two minutes
    python benchmarks/around.py --device cuda --shapes 0.5b,1b,8b   # one GPU of 80 GB, 64 GB on disk

Each shape is a Llama with random weights, written shard by shard, and a tokenizer of its vocabulary. main.py trains it
in MXFP4 for a few steps with two checkpoints, evaluates it, saves, exports and proves it. 8b has no FP32 masters, keeps
BF16 moments and writes one checkpoint. Phases are those of phases.py. The first run of a shape reads what was just
written, so from the page cache.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import write_conversations  # noqa: E402

from benchmarks.accuracy_rows import ROWS  # noqa: E402
from benchmarks.arguments import chosen, make_parser  # noqa: E402
from benchmarks.launch import last_error, modules_of, offline  # noqa: E402
from benchmarks.phases import EXIT, PHASES  # noqa: E402
from benchmarks.random_llama import SHAPES, write_model  # noqa: E402
from benchmarks.report import environment  # noqa: E402
from qat.command_line import positive  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

WITHOUT_MASTERS = ("--master_dtype", "bfloat16", "--moment_dtype", "bfloat16", "--gradient_checkpointing", "True")
FLAGS = {"8b": WITHOUT_MASTERS}
ONE_CHECKPOINT = ("8b",)  # which takes 48 GB
_MILLION = 10**6


def command_of(shape: str, model: Path, data: Path, out: Path, args) -> list[str]:
    """The arguments of main.py."""
    every = args.steps if shape in ONE_CHECKPOINT else args.steps // 2
    return [
        "--model_name_or_path", str(model), "--dataset", str(data), "--eval_size", "8", "--output_dir", str(out),
        "--do_train", "True", "--do_eval", "True", "--quant_scheme", "MXFP4", "--max_steps", str(args.steps),
        "--save_steps", str(every), "--save_total_limit", "1", "--eval_strategy", "no", "--load_best_model_at_end",
        "False", "--per_device_train_batch_size", str(args.batch), "--model_max_length", str(args.length),
        "--packing", str(ROWS["recipe"].packing), "--report_to", "none", "--disable_tqdm", "True",
        *FLAGS.get(shape, ()), *args.flags,
    ]  # fmt: skip


def measure(command: list[str], work: Path, root: Path) -> dict[str, float]:
    """Seconds by phase of one run of the main.py in `root`.

    Raises:
        UserError: it failed; the message has the line with the error.
    """
    out, log = work / "phases.json", work / "log.txt"
    env = offline(os.cpu_count() or 1) | {"PYTHONPATH": modules_of(root)}
    program = [sys.executable, str(Path(__file__).with_name("phases.py"))]
    with log.open("w") as file:
        began = time.time()
        code = subprocess.call(
            [*program, str(began), str(out), str(root), *command], cwd=root, env=env, stdout=file, stderr=file
        )
        ended = time.time()
    if code:
        raise UserError(f"main.py ended with status {code}: {last_error(log)}")
    seconds = json.loads(out.read_text())
    return {**seconds, EXIT: ended - seconds.pop("returned"), "in all": ended - began}


def draw(rows: list[dict], path: Path, device: str) -> None:
    """Seconds by phase over parameters, both logarithmic; only phases that take half a second somewhere."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    sizes = sorted({row["parameters"] for row in rows})
    phases = [p for p in (*PHASES, "in all") if any(r["phase"] == p and r["seconds"] >= 0.5 for r in rows)]
    for i, phase in enumerate(phases):
        points = sorted((r["parameters"], max(r["seconds"], 0.01)) for r in rows if r["phase"] == phase)
        style = {"color": "black", "linewidth": 2.5} if phase == "in all" else {"color": colours[i % 20]}
        axis.plot(*zip(*points, strict=True), marker="o", label=phase, **style)
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title=f"A short MXFP4 run, {device}")
    axis.set_xticks(sizes, [f"{size / _MILLION:,.0f} M" for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def table(rows: list[dict]) -> str:
    """Phases as rows, shapes as columns."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["phase"], row["shape"]): row["seconds"] for row in rows}
    lines = [f"{'seconds':<26}" + "".join(f"{shape:>12}" for shape in shapes)]
    for phase in (*PHASES, "in all"):
        lines.append(f"{phase:<26}" + "".join(f"{found.get((phase, shape), 0):>12.2f}" for shape in shapes))
    return "\n".join(lines)


def main() -> None:
    """Measure each shape, write the rows and draw them."""
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--shapes", default="tiny,0.1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=positive, default=4)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--length", type=positive, default=256)
    parser.add_argument("--work", type=Path, help="where models and runs are written; default: a temporary folder")
    parser.add_argument("--against", type=Path, help="another copy of the repository, whose runs alternate with ours")
    parser.add_argument("--flags", type=shlex.split, default=[], help='more of main.py: "--export_format none"')
    args = parser.parse_args()
    shapes = chosen("--shapes", args.shapes, SHAPES)
    if args.device == "cpu":
        args.flags = ["--use_cpu", "True", *args.flags]
    roots = {"": ROOT} | ({"before": args.against.resolve()} if args.against else {})
    rows, about = [], environment(args.device)
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            rows += measure_shape(shape, Path(folder), roots, args)
        print(table([row for row in rows if row["shape"].startswith(shape)]), "\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"around_{args.device}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "seconds": f"{row['seconds']:.3f}", **about} for row in rows)
    draw([row for row in rows if " " not in row["shape"]], path.with_suffix(".png"), about["device"])
    print(*(f"{key}: {value}" for key, value in about.items()), table(rows), sep="\n")


def measure_shape(shape: str, work: Path, roots: dict[str, Path], args) -> list[dict]:
    """The medians of a shape's phases; those of another copy have its name behind the shape's."""
    parameters = write_model(shape, work / "model")
    data = write_conversations(work / "data.jsonl", 2000)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for number in range(args.repeats):
        for name, root in roots.items():
            out = work / f"run{number}{name}"
            command = command_of(shape, work / "model", data, out, args)
            command += ["--data_cache_dir", str(work / f"cache{number}{name}")]
            runs[name].append(measure(command, work, root))
            shutil.rmtree(out)
    return [
        {"shape": f"{shape} {name}".strip(), "parameters": parameters, "phase": phase,
         "seconds": median(run.get(phase, 0.0) for run in found)}
        for name, found in runs.items() for phase in (*PHASES, "in all")
    ]  # fmt: skip


if __name__ == "__main__":
    with reported_in_one_line():
        main()
