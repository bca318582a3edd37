"""Training a row of the table of real models with main.py, in pieces that resume."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.real_rows import row_of
from benchmarks.report import write_text
from qat.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "main.py"
_SAMPLE = {"teacher": 256, "chat": 512}  # tokens of a text, and of a conversation, that the teacher samples
_SAVING_S = 60  # left to a training that has to end
LEAST_MINUTES = 4  # of a call that trains: what it needs to start, and what is left to save


class OutOfTime(Exception):
    """The minutes of this call are over; what is finished is kept."""


def train(key: str, folder: Path, flags_of: Callable[[str], list[str]], deadline: float) -> None:
    """Train a row with main.py, or resume it; a deadline or SIGTERM ends main.py, which then keeps a checkpoint.

    Args:
        folder: of the row; the trained model is in "trained", and "trained.json" has steps, tokens and minutes.
        flags_of: the arguments of main.py, from `key`.
        deadline: of time.monotonic().

    Raises:
        OutOfTime: some of the training is left for the next call.
        UserError: main.py failed.
    """
    row = row_of(key)
    if row.recipe is None or (folder / "trained.json").exists():
        return
    if deadline - time.monotonic() < 2 * _SAVING_S:  # too little to start, train and save
        raise OutOfTime
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(MAIN), *flags_of(key)]
    start = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        with forwarded(child):
            try:
                child.wait(max(1.0, deadline - time.monotonic() - _SAVING_S))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)
                child.wait()
    with (folder / "seconds.txt").open("a") as file:
        file.write(f"{time.monotonic() - start:.1f}\n")
    if child.returncode in (143, -signal.SIGTERM):
        raise OutOfTime
    if child.returncode:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        raise UserError(f"{key} was not trained: {lines[-1][:300]} (see {folder / 'log.txt'})")
    seconds = sum(map(float, (folder / "seconds.txt").read_text().split()))
    figures = {"steps": row.steps, "train_minutes": seconds / 60, "tokens": tokens_trained_on(folder / "trained")}
    write_text(folder / "trained.json", json.dumps(figures))
    for checkpoint in (folder / "trained").glob("checkpoint-*"):  # 12 bytes a parameter; nothing resumes from it
        shutil.rmtree(checkpoint)


@contextmanager
def forwarded(child: subprocess.Popen) -> Iterator[None]:
    """SIGTERM goes on to `child`, which would train on alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def flags(key: str, base: Path, trained: Path, data: Path, args: argparse.Namespace) -> list[str]:
    """The arguments of main.py for a row.

    Args:
        base: folder of the BF16 model.
        trained: folder to write, OUT/rows/KEY/trained; samples of the teacher are kept in OUT.
        data: the training file.
        args: of `real_models.py`.
    """
    row = row_of(key)
    rate = {} if row.learning_rate == "recipe" else {"learning_rate": row.learning_rate or str(args.learning_rate)}
    samples = {}
    if (kind := str(row.flags.get("distill_generic", "none")).partition(":")[0]) != "none":
        samples = {
            "distill_generic_length": min(_SAMPLE[kind], args.length),
            "distill_cache_dir": trained.parents[2].absolute() / "samples",
        }
    settings = {
        "config": ROOT / "recipes" / f"{row.recipe}.yaml", "model_name_or_path": base.absolute(),
        "output_dir": trained.absolute(), "export_format": "none",
        "dataset": data.absolute(), "eval_dataset": "none", "do_eval": False,
        "eval_strategy": "no", "load_best_model_at_end": False, "max_steps": row.steps,
        "save_strategy": "no", "seed": row.seed, "data_seed": row.seed,
        "per_device_train_batch_size": args.train_batch_size, "model_max_length": args.length,
        "on_bad_sample": "skip", "report": False, "report_to": "none", "disable_tqdm": True,
    } | rate | samples | row.flags  # fmt: skip
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
    ]


def tokens_trained_on(folder: Path) -> int:
    """Labelled and generic tokens that a finished run has trained on, from its trainer_state.json."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kinds = ("labelled_tokens", "generic_tokens")
    return sum(max((entry[kind] for entry in history if kind in entry), default=0) for kind in kinds)
