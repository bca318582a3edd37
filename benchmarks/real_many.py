"""Measure rows of real_models.py on all GPUs of a machine at once, several on each.

    python benchmarks/real_many.py --per_gpu 2 -- --model runs/models/qwen2.5-coder-1.5b \\
      --gguf_file Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf --out runs/real/qwen2.5-coder-1.5b --minutes 20

Arguments behind -- are those of real_models.py. Its rows begin in the order given, each in a process of its own, on the
GPU with the most memory left. A row is taken to need --train_gb until it is trained, and --measure_gb afterwards; one
that fits nowhere waits. The minutes of training in the table are longer than alone on a GPU: its device says so.

The processes of a call end with it, and the next call resumes their rows. A row that fails is begun once more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import real_models  # noqa: E402
from benchmarks.launch import kill_with_children  # noqa: E402
from benchmarks.real_report import BASELINE, LEGEND, lines, write_csv  # noqa: E402
from benchmarks.real_rows import row_of  # noqa: E402
from qat.command_line import OneLineParser, positive, positive_number  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

PROGRAM = [sys.executable, str(Path(__file__).with_name("real_models.py"))]
ENDS_S = 90  # the time that a row has to end in
_LEAST_S = 1.0  # of a process


@dataclass
class Job:
    """A process on a GPU.

    Attributes:
        key: of the row that it measures, or a name.
        gpu: number of the GPU.
        process: real_models.py.
    """

    key: str
    gpu: int
    process: subprocess.Popen


class Machine:
    """The GPUs of a machine, and what runs on them.

    Args:
        args: of real_models.py.
        words: the same, as given.
        own: of this program.
    """

    def __init__(self, args: argparse.Namespace, words: Sequence[str], own: argparse.Namespace) -> None:
        self.args, self.words, self.own = args, list(words), own
        self.table = real_models.Table(args)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.names = visible.split(",") if visible else [str(gpu) for gpu in range(own.gpus)]
        self.jobs: list[Job] = []  # rows
        self.others: list[Job] = []  # what makes the training data
        self.failed: dict[str, int] = {}  # how often a row did
        self.began = time.monotonic()
        self.deadline = self.began + 60 * args.minutes

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)

    def needs(self, key: str) -> float:
        """GB that a row is taken to need now."""
        is_trained = row_of(key).recipe is None or (self.args.out / "rows" / key / "trained.json").exists()
        return self.own.measure_gb if is_trained else self.own.train_gb

    def place(self, needed: float) -> int | None:
        """The GPU for a row: that with the most memory left; None where none has enough of it, or `per_gpu` rows."""
        left = dict.fromkeys(range(self.own.gpus), self.own.gpu_gb)
        rows = dict.fromkeys(left, 0)
        for job in self.jobs:
            left[job.gpu] -= self.needs(job.key)
            rows[job.gpu] += 1
        free = [gpu for gpu in left if left[gpu] >= needed and rows[gpu] < self.own.per_gpu]
        return max(free, key=lambda gpu: left[gpu], default=None)

    def start(self, key: str, gpu: int, *more: str) -> Job:
        """Begin real_models.py, with arguments behind those given, which win over them."""
        log = self.args.out / "logs" / f"{key}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*PROGRAM, *self.words, "--minutes", f"{self.left_s() / 60:.4f}"]
        command += ["--rows_on_gpu", str(self.own.per_gpu), *more]
        threads = max(1, (os.cpu_count() or 1) // (self.own.gpus * self.own.per_gpu))
        environment = {"OMP_NUM_THREADS": str(threads), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        environment = environment | os.environ | {"CUDA_VISIBLE_DEVICES": self.names[gpu]}
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.say(f"{key} begins on GPU {self.names[gpu]}")
        return Job(key, gpu, process)

    def start_row(self, key: str, gpu: int) -> None:
        """Begin a row."""
        self.jobs.append(self.start(key, gpu, "--rows", key))

    def ended(self, jobs: list[Job]) -> list[Job]:
        """The jobs that have ended; they are taken out of the list."""
        found = [job for job in jobs if job.process.poll() is not None]
        for job in found:
            jobs.remove(job)
            self.say(f"{job.key} ended with status {job.process.returncode}")
        return found

    def answer(self) -> None:
        """Make the training data, in as many processes as there are places, beside the row that needs none.

        Raises:
            UserError: it was not made, although there was time.
        """
        if BASELINE in self.args.rows:
            self.start_row(BASELINE, 0)
        places = [gpu for _ in range(self.own.answering) for gpu in range(self.own.gpus)]
        for number, gpu in enumerate(places):
            name = f"training-data-{number}"
            self.others.append(self.start(name, gpu, "--training_share", f"{number}/{len(places)}"))
        while self.others and self.left_s() > -ENDS_S:
            self.ended(self.others)
            time.sleep(self.own.pause)
        if self.left_s() > 0 and not self.table.training_file_is_there():
            raise UserError(f"the training data was not made; see training-data-* in {self.args.out / 'logs'}")

    def measure(self) -> None:
        """Measure rows until all have ended or the time is over."""
        waiting = [key for key in self.args.rows if key not in {job.key for job in self.jobs}]
        while (waiting or self.jobs) and self.left_s() > -ENDS_S:
            for job in self.ended(self.jobs):
                if job.process.returncode == 0:
                    self.failed.pop(job.key, None)
                    continue
                self.failed[job.key] = self.failed.get(job.key, 0) + 1
                if self.failed[job.key] == 1:
                    waiting.insert(0, job.key)
            for key in list(waiting) if self.left_s() > _LEAST_S else ():
                if (gpu := self.place(self.needs(key))) is not None:
                    waiting.remove(key)
                    self.start_row(key, gpu)
            if not self.jobs and self.left_s() <= _LEAST_S:
                return
            time.sleep(self.own.pause)

    def end(self) -> None:
        """End what still runs: SIGTERM has main.py keep a checkpoint."""
        jobs = [*self.jobs, *self.others]
        for job in jobs:
            job.process.terminate()
        last = time.monotonic() + ENDS_S
        for job in jobs:
            try:
                job.process.wait(max(0.0, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill_with_children(job.process)

    def missing(self) -> list[str]:
        """Rows of which a figure is not there."""
        rows = self.args.out / "rows"
        return [k for k in self.args.rows if not all((rows / k / f"{f}.json").exists() for f in self.args.figures)]


def main(argv: list[str] | None = None) -> None:
    """Measure, and print what is there."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=positive, help="default: all that are visible")
    parser.add_argument("--per_gpu", type=positive, default=2, help="rows on a GPU at once, at most")
    parser.add_argument("--answering", type=positive, default=2, help="processes on a GPU that make training data")
    parser.add_argument("--gpu_gb", type=positive_number, default=78.0, help="of a GPU that rows may use")
    parser.add_argument("--train_gb", type=positive_number, default=40.0, help="of a row that is trained")
    parser.add_argument("--measure_gb", type=positive_number, default=22.0, help="of a row that is measured")
    parser.add_argument("--pause", type=positive_number, default=1.0, help="seconds between two looks")
    if "--" not in words and not {"-h", "--help"} & set(words):
        raise UserError(
            "the arguments of real_models.py go behind --, as in: real_many.py --per_gpu 2 -- --model M ..."
        )
    own, rest = parser.parse_args(words[:cut]), words[cut + 1 :]
    args = real_models.parse(rest)
    own.gpus = own.gpus or torch.cuda.device_count()
    if not own.gpus:
        raise UserError("there is no GPU; benchmarks/real_models.py measures on a CPU, or give --gpus 1")
    machine = Machine(args, rest, own)
    if own.gpus > len(machine.names):
        raise UserError(f"--gpus {own.gpus} are more than CUDA_VISIBLE_DEVICES={','.join(machine.names)} has")
    if (most := max(map(machine.needs, args.rows))) > own.gpu_gb:
        raise UserError(f"--gpu_gb {own.gpu_gb:g} is less than the {most:g} of a row (--train_gb, --measure_gb)")

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    try:
        machine.table.write_base()
        machine.say("the model is written")
        if not machine.table.training_file_is_there() and args.rows != [BASELINE] and machine.left_s() > _LEAST_S:
            machine.answer()
        machine.measure()
    finally:
        machine.end()
        signal.signal(signal.SIGTERM, before)
    if (args.out / "rows").exists():
        write_csv(args.out, real_models.FIGURES)
    missing = machine.missing()
    print(real_models.OVER.format(args.minutes) if missing else real_models.ALL_DONE)
    print(f"\nBaseline: {machine.table.baseline}. {LEGEND}", *lines(args.out, args.rows, args.figures), sep="\n")
    if machine.failed:
        raise UserError(f"not measured: {', '.join(machine.failed)}; see {args.out / 'logs'}")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
