"""Measure whole runs of main.py on several GPUs: an 8B-shaped Llama, and a mixture of experts, under FSDP2.

    python benchmarks/scale.py --runs 4:BF16,4:MXFP4,4:distilled
    python benchmarks/scale.py --runs 2:BF16,2:MXFP4 --parallel               # both at once, on four GPUs
    python benchmarks/scale.py --runs 4:MXFP4:resume:export                   # checkpoint, resumed run, packed model
    python benchmarks/scale.py --device cpu --shape tiny --runs 2:BF16:64,4:MXFP4:64:resume

A run is words joined by colons: how many GPUs, the stage (BF16, MXFP4 or distilled: MXFP4 with a BF16 copy as teacher),
and in any order the tokens of a row (2048; one sample fills it), `rowsN` for N rows of a batch on each GPU (2),
`samplesN` for N samples in each row, a shape, an attention of transformers (sdpa, flex_attention), `resume`, which
writes a checkpoint and resumes from it, and `export`, which saves the model, packs it and proves it. Without these two
a run ends once it has trained.

The weights are random and kept in --work. Each run is a row of scale.csv as soon as it has ended; a failed one is a row
with its error. Runs that --minutes leaves no time for are skipped, and the program says which.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from threading import Condition

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.accuracy_rows import ROWS  # noqa: E402
from benchmarks.launch import launcher, offline, run_logged  # noqa: E402
from benchmarks.report import environment  # noqa: E402
from benchmarks.scale_figures import COLUMNS, WARM_UP, Table, figures, figures_resumed, ratios, show, show_header  # noqa: E402
from benchmarks.scale_inputs import SHAPES, check_same, with_attention, write_data, write_model  # noqa: E402
from benchmarks.scale_run import STAGES, Run  # noqa: E402
from benchmarks.timed_main import TRAINS_ONLY  # noqa: E402
from qat.command_line import OneLineParser, not_negative, not_negative_number, positive, positive_number  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

RESUMED_STEPS = 2
ROWS_OF_DATA = 32  # which a run reads several times


def checkpointing_flag() -> str:
    """The name of activation checkpointing, as the installed transformers has it; older ones know the second."""
    names = {field.name for field in fields(transformers.TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def apart(function: Callable, *args):
    """Call `function` in a process of its own, which leaves no CUDA context on the GPUs that runs are going to fill."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Bench:
    """Runs main.py under FSDP2 with the same settings and reads its times."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.time() + 60 * args.minutes
        self.port = 20000 + os.getpid() * 16 % 20000
        self.threads = max(1, (os.cpu_count() or 1) // len(args.devices))

    # ---- What a run reads ----

    def inputs(self, run: Run) -> tuple[Path, Path]:
        """Folder of the model and file of the data; made where they are not there yet."""
        config = SHAPES[run.shape].config(self.args.layers, self.args.vocabulary)
        model = self.args.work / run.shape
        if not model.is_dir():
            apart(write_model, model, config, self.args.device)
        check_same(model, config)
        model = with_attention(model, run.attention) if run.attention != "sdpa" else model
        data = self.args.work / f"{run.shape}-{run.tokens}-{run.samples}.jsonl"
        if not data.exists():
            write_data(data, config.vocab_size, ROWS_OF_DATA, run.tokens, run.samples)
        return model, data

    def command(self, run: Run, folder: Path, times: Path, steps: int, saves: bool) -> list[str]:
        """The command line of main.py with a clock."""
        model, data = self.inputs(run)
        self.port += 1
        saving = ("--save_steps", str(steps)) if saves else ("--save_strategy", "no")
        return [
            *launcher("fsdp2", run.gpus, self.port), "benchmarks/timed_main.py", str(times),
            "--model_name_or_path", str(model), "--dataset", str(data), "--eval_dataset", "none",
            "--data_cache_dir", str(self.args.work / "cache"), "--output_dir", str(folder), "--do_train", "True",
            "--packing", str(ROWS["recipe"].packing), "--model_max_length", str(run.tokens),
            "--max_steps", str(steps), *saving,
            "--per_device_train_batch_size", str(run.rows), f"--{checkpointing_flag()}", "True",
            "--learning_rate", "1e-5", "--lr_scheduler_type", "constant", "--logging_steps", "1",
            "--report_to", "none", "--report", "False", "--disable_tqdm", "True",
            *(() if run.exports else ("--export_format", "none")), *STAGES[run.stage], *self.args.flags,
        ]  # fmt: skip

    # ---- One run ----

    def launch(self, run: Run, devices: list[str], name: str, steps: int, saves: bool, goes_on: bool) -> list[dict]:
        """Run main.py in the folder of `run`; the times of each process.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        folder, times = self.folder_of(run), self.args.work / "times" / name
        shutil.rmtree(times, ignore_errors=True)
        environment = offline(self.threads) | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        if self.args.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        if not goes_on:
            environment[TRAINS_ONLY] = "1"
        log = self.args.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self.command(run, folder, times, steps, saves)
        run_logged(command, log, environment, max(1, min(self.args.timeout, self.end + 20 - time.time())))
        return [json.loads(path.read_text()) for path in sorted(times.glob("process-*.json"))]

    def folder_of(self, run: Run) -> Path:
        return self.args.work / "out" / run.name.replace(":", "-")

    def measure(self, run: Run, devices: list[str], beside: int = 0) -> dict:
        """The row of one run; one that fails says why, and has what was measured before."""
        begin, steps, name = time.time(), self.args.steps, run.name.replace(":", "-")
        row = dict.fromkeys(COLUMNS, "") | {
            "run": run.name, "gpus": run.gpus, "stage": run.stage, "shape": run.shape, "rows_a_gpu": run.rows,
            "layers": SHAPES[run.shape].config(self.args.layers).num_hidden_layers, "row_tokens": run.tokens,
            "samples_a_row": run.samples, "attention": run.attention, "beside": beside,
        }  # fmt: skip
        shutil.rmtree(self.folder_of(run), ignore_errors=True)
        try:
            goes_on = run.exports and not run.resumes
            row |= figures(self.launch(run, devices, name, steps, run.resumes, goes_on), run.rows, begin)
            if run.resumes:
                checkpoint = self.folder_of(run) / f"checkpoint-{steps}"
                row["checkpoint_gb"] = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) / 1e9
                begin_again, steps = time.time(), steps + RESUMED_STEPS
                found = self.launch(run, devices, f"{name}-resumed", steps, False, run.exports)
                row |= figures_resumed(found, begin_again)
        except RuntimeError as error:
            row["error"] = str(error)
        if not self.args.keep:
            shutil.rmtree(self.folder_of(run), ignore_errors=True)
        return row | {"total_s": time.time() - begin}


# ---- Several runs ----


class Devices:
    """GPUs that runs take and give back; without `parallel` one run has them all."""

    def __init__(self, names: list[str], parallel: bool) -> None:
        self.free, self.parallel, self.running, self.changed = list(names), parallel, 0, Condition()

    def take(self, count: int) -> tuple[list[str], int]:
        """Wait for `count` of them; with how many other runs they compute at the same time now."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count and (self.parallel or not self.running))
            taken, self.free = self.free[:count], self.free[count:]
            self.running += 1
            return taken, self.running - 1

    def give(self, taken: list[str]) -> None:
        with self.changed:
            self.free += taken
            self.running -= 1
            self.changed.notify_all()


def measure_all(bench: Bench, runs: list[Run], devices: Devices, keep_row: Callable[[dict], None]) -> None:
    """Measure `runs` in their order; name those that are skipped for want of time."""
    begin = time.time()
    for run in runs:
        bench.inputs(run)
    print(f"models and data: {time.time() - begin:.0f} s", flush=True)
    begun = []
    with ThreadPoolExecutor(len(runs)) as pool:
        for run in runs:
            taken, beside = devices.take(run.gpus)
            if bench.end - time.time() < bench.args.least:
                devices.give(taken)
                print(f"skipped for want of time: {run.name}", flush=True)
                continue
            begun.append(pool.submit(_measure_and_give, bench, run, devices, taken, beside, keep_row))
    for future in begun:
        future.result()


def _measure_and_give(bench: Bench, run: Run, devices: Devices, taken: list[str], beside: int, keep_row) -> None:
    try:
        keep_row(bench.measure(run, taken, beside))
    finally:
        devices.give(taken)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `runs` is a list of Run.

    Raises:
        UserError: a run is not understood, or needs more GPUs than there are.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="", help="RUN,RUN,... such as 2:BF16,4:MXFP4:16384; none: show scale.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="8b", choices=SHAPES, help="of runs that name none")
    parser.add_argument("--layers", type=not_negative, default=0, help="decoder layers; 0 for all of the shape")
    parser.add_argument("--vocabulary", type=not_negative, default=0, help="tokens; 0 for those of the shape")
    parser.add_argument("--steps", type=positive, default=8, help=f"the first {WARM_UP} are not counted")
    parser.add_argument("--parallel", action="store_true", help="let runs share the machine while GPUs are free")
    parser.add_argument(
        "--minutes", type=positive_number, default=8, help="after that no run begins, and one that runs is ended"
    )
    parser.add_argument(
        "--least", type=not_negative_number, default=100, help="seconds that must be left for a run to begin"
    )
    parser.add_argument("--timeout", type=positive_number, default=420, help="seconds for one launch of main.py")
    parser.add_argument("--work", type=Path, help="models, checkpoints and logs; default: a new temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep what the runs wrote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("flags", nargs="*", help="after --: further flags of main.py, for every run")
    args = parser.parse_args(argv)
    args.runs = [Run.parse(name, args.shape) for name in args.runs.split(",") if name]
    if args.steps < WARM_UP + 2:
        raise UserError(f"--steps {args.steps} is too few; the first {WARM_UP} are not counted, two more are needed")
    names = [str(i) for i in range(torch.cuda.device_count() if args.device == "cuda" else 64)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    args.devices = visible.split(",") if visible and args.device == "cuda" else names
    for run in args.runs:
        if run.gpus > len(args.devices):
            raise UserError(f"--runs {run.name!r} needs {run.gpus} GPUs; there are {len(args.devices)}")
    if args.work is None and args.runs:
        args.work = Path(tempfile.mkdtemp(prefix="scale-"))
        print(f"--work {args.work}", flush=True)
    args.work = None if args.work is None else args.work.resolve()
    return args


def main(argv: list[str] | None = None) -> None:
    """Show the rows that there are, measure the runs, print the ratios."""
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    about = apart(environment, args.device)
    table, begin = Table(args.out / "scale.csv", about), time.time()
    show_header()
    for row in table.rows:
        show(row)
    if args.runs:
        measure_all(Bench(args), args.runs, Devices(args.devices, args.parallel), table.add)
    for name, value in ratios(table.rows).items():
        print(f"{value:8.3f}  {name}")
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(f"{time.time() - begin:.0f} s" + (f"; outputs of main.py: {args.work / 'logs'}" if args.work else ""))


if __name__ == "__main__":
    with reported_in_one_line():
        main()
