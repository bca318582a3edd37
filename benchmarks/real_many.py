"""Measure rows of real_models.py on all GPUs of a machine at once, several on each.

    python benchmarks/real_many.py --per_gpu 3 -- --model runs/models/qwen2.5-coder-1.5b \\
      --gguf_file Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf --out runs/real/qwen2.5-coder-1.5b --minutes 20

Arguments behind -- are those of real_models.py; its rows begin in the order given, each in a process of its own, on the
GPU with the most memory left. What a row needs is reckoned, not measured: --train_gb until it is trained, --measure_gb
afterwards. Answers are bound by the processor, so that two or three rows on a GPU take little longer than one. Minutes
of training are longer than alone, by as much.

The processes of a call end with it; the next call resumes their rows. A row that fails is begun once more.
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
from benchmarks.real_report import BASELINE, LEGEND, lines  # noqa: E402
from benchmarks.real_rows import row_of  # noqa: E402
from qat.command_line import OneLineParser, positive, positive_number  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

PROGRAM = [sys.executable, str(Path(__file__).with_name("real_models.py"))]
_ENDS_S = 90  # the time that a row has to end in


@dataclass
class Job:
    """A row that is measured.

    Attributes:
        key: of the row, or the name of what is done beside the rows.
        gpu: number of the GPU.
        process: that measures it.
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
        self.jobs: list[Job] = []
        self.deadline = time.monotonic() + 60 * args.minutes
        self.began = time.monotonic()

    def needs(self, key: str) -> float:
        """GB that a row is reckoned to need now."""
        is_trained = row_of(key).recipe is None or (self.args.out / "rows" / key / "trained.json").exists()
        return self.own.measure_gb if is_trained else self.own.train_gb

    def place(self, needed: float) -> int | None:
        """The GPU for a row: that with the most memory left; None where none has enough, or a place."""
        left = dict.fromkeys(range(self.own.gpus), self.own.gpu_gb)
        rows = dict.fromkeys(left, 0)
        for job in self.jobs:
            left[job.gpu] -= self.needs(job.key)
            rows[job.gpu] += 1
        free = [gpu for gpu in left if left[gpu] >= needed and rows[gpu] < self.own.per_gpu]
        return max(free, key=lambda gpu: left[gpu], default=None)

    def start(self, key: str, gpu: int, *more: str) -> Job:
        """Begin real_models.py with other arguments behind those given."""
        log = self.args.out / "logs" / f"{key}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        minutes = (self.deadline - time.monotonic()) / 60
        command = [*PROGRAM, *self.words, "--minutes", f"{minutes:.3f}", *more]
        threads = max(1, (os.cpu_count() or 1) // (self.own.gpus * self.own.per_gpu))
        environment = {"OMP_NUM_THREADS": str(threads), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        environment = environment | os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.say(f"{key} begins on GPU {gpu}")
        return Job(key, gpu, process)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)

    def ended(self, jobs: list[Job]) -> list[Job]:
        """The jobs that have ended; they are taken out of the list."""
        found = [job for job in jobs if job.process.poll() is not None]
        for job in found:
            jobs.remove(job)
            self.say(f"{job.key} ended with status {job.process.returncode}")
        return found

    def answer(self) -> None:
        """Make the training data, in as many processes as there are places."""
        places = [gpu for _ in range(self.own.answering) for gpu in range(self.own.gpus)]
        jobs = [
            self.start(f"training-{number}", gpu, "--training_share", f"{number}/{len(places)}")
            for number, gpu in enumerate(places)
        ]
        try:
            while jobs and time.monotonic() < self.deadline + _ENDS_S:
                self.ended(jobs)
                time.sleep(self.own.pause)
        finally:
            end(jobs)

    def run(self, keys: Sequence[str]) -> list[str]:
        """Measure rows until all are done or the time is over; returns those that failed twice."""
        left, failed = [key for key in keys if key not in {job.key for job in self.jobs}], []
        begun = {key: int(key not in left) for key in keys}
        try:
            while (left or self.jobs) and time.monotonic() < self.deadline + _ENDS_S:
                for job in self.ended(self.jobs):
                    if job.process.returncode and begun[job.key] < 2:
                        left.insert(0, job.key)
                    elif job.process.returncode:
                        failed.append(job.key)
                for key in list(left) if time.monotonic() < self.deadline else ():
                    if (gpu := self.place(self.needs(key))) is not None:
                        left.remove(key)
                        begun[key] += 1
                        self.jobs.append(self.start(key, gpu, "--rows", key))
                if not self.jobs and time.monotonic() >= self.deadline:
                    break
                time.sleep(self.own.pause)
        finally:
            end(self.jobs)
        return failed


def end(jobs: list[Job]) -> None:
    """End what still runs: SIGTERM has main.py keep a checkpoint."""
    for job in jobs:
        job.process.terminate()
    for job in jobs:
        try:
            job.process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            job.process.kill()
    jobs.clear()


def main(argv: list[str] | None = None) -> None:
    """Measure, and print what is there."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=positive, help="default: all of this machine")
    parser.add_argument("--per_gpu", type=positive, default=2, help="rows on a GPU at once")
    parser.add_argument("--answering", type=positive, default=2, help="processes on a GPU that make training data")
    parser.add_argument("--gpu_gb", type=positive_number, default=78.0, help="of a GPU that rows may use")
    parser.add_argument("--train_gb", type=positive_number, default=40.0, help="of a row that is trained")
    parser.add_argument("--measure_gb", type=positive_number, default=22.0, help="of a row that is measured")
    parser.add_argument("--pause", type=positive_number, default=1.0, help="seconds between two looks")
    own, rest = parser.parse_args(words[:cut]), words[cut + 1 :]
    args = real_models.parse(rest)
    own.gpus = own.gpus or torch.cuda.device_count()
    if not own.gpus:
        raise UserError("there is no GPU; benchmarks/real_models.py measures on a CPU, or give --gpus 1")
    if (most := max(own.train_gb, own.measure_gb)) > own.gpu_gb:
        raise UserError(f"--gpu_gb {own.gpu_gb:g} is less than a row needs, {most:g}; give less for a row")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    machine, table = Machine(args, rest, own), real_models.Table(args)
    table.write_base()
    machine.say("the model is written")
    if not table.training_file_is_there() and any(key != BASELINE for key in args.rows):
        if BASELINE in args.rows:  # it needs no training data
            machine.jobs.append(machine.start(BASELINE, 0, "--rows", BASELINE))
        machine.answer()
        if not table.training_file_is_there() and time.monotonic() < machine.deadline:
            end(machine.jobs)
            raise UserError(f"the training data was not made; see {args.out / 'logs'}")
    failed = machine.run(args.rows)
    print(f"\nBaseline: {table.baseline}. {LEGEND}", *lines(args.out, args.rows, args.figures), sep="\n")
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; see {args.out / 'logs'}")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
