"""main.py with a clock: when each part of a run begins and ends, and the memory of each GPU.

    accelerate launch --config_file accelerate_config/fsdp2.yaml benchmarks/timed_main.py TIMES FLAG ...

Each process writes `TIMES/process-N.json` at its end, and after every part. Nothing else differs from main.py, but that
the device is waited for at the end of each step and part. With the environment variable TIMED_MAIN_TRAINS_ONLY, the run
ends once it has trained: no final model is saved. Processes without a GPU have FSDP too, as in the tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

BEGUN = time.time()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from benchmarks.clock import Clock, wait_for_gpu  # noqa: E402

TRAINS_ONLY = "TIMED_MAIN_TRAINS_ONLY"


class Times(TrainerCallback):
    """Seconds since the epoch at which parts of a run begin and end, kept in a file of each process.

    Attributes:
        clock: has [begin, end] of each part, by its name; the last one, if it happened several times.
        steps: [begin, end] of each step.
        losses: those that were logged.
        row_tokens: of the first row of the training data; 0 until training begins.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"process-{os.environ.get('RANK', 0)}.json"
        self.clock = Clock(BEGUN, "import")
        self.steps: list[list[float]] = []
        self.losses: list[float] = []
        self.row_tokens = 0
        self.memory: dict[str, int] = {}

    def follow(self, owner: Any, function: str, name: str) -> None:
        """Let `owner`'s function be the part `name` whenever it is called."""
        self.clock.follow(owner, function, name, after=self.write)

    def write(self) -> None:
        """Write everything to the file of this process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: getattr(self, name) for name in ("steps", "losses", "row_tokens", "memory")}
        self.path.write_text(json.dumps({"begun": BEGUN, "parts": self.clock.intervals} | kept))

    # ---- What Trainer calls ----

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        self.row_tokens = len(train_dataloader.dataset[0]["input_ids"])
        self.clock.intervals["train begins"] = [time.time()] * 2

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.steps.append([time.time()])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        wait_for_gpu()
        self.steps[-1].append(time.time())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.memory = dict(zip(("allocated", "reserved"), peaks, strict=True))
        self.write()


def clock_parts(main: Any, times: Times) -> None:
    """Have `times` take the times of the parts of the module `main`, and be told of each step."""
    times.follow(main, "make_supervised_data_module", "data")
    times.follow(main.Start, "load_model", "load")
    times.follow(main, "check_packing", "check packing")
    times.follow(main, "attend_within_samples", "attention")
    times.follow(main, "choose_teacher", "teacher")
    times.follow(main.Start, "quantize", "quantize")
    times.follow(main.OutputFolder, "find_checkpoint", "find checkpoint")
    times.follow(main.OutputFolder, "pack", "export")
    trainer = main.QATTrainer
    times.follow(trainer, "_save_checkpoint", "save checkpoint")
    times.follow(trainer, "save_state", "save state")
    times.follow(main, "train", "train")
    begin_with = trainer.__init__

    @wraps(begin_with)
    def with_clock(self, *args, **kwargs):
        begin_with(self, *args, **kwargs)
        self.add_callback(times)

    trainer.__init__ = with_clock
    if os.environ.get(TRAINS_ONLY):
        main.save = lambda *args: None
        return
    save_model = trainer.save_model

    @wraps(save_model)
    def timed_save(self, output_dir=None, _internal_call=False):
        with times.clock.phase("part of a checkpoint" if _internal_call else "save model"):
            save_model(self, output_dir, _internal_call)
        times.write()

    trainer.save_model = timed_save


def run(folder: Path, flags: list[str]) -> None:
    """One run of main.py with these flags."""
    if not torch.cuda.is_available():
        import fsdp_on_cpu

        fsdp_on_cpu.enable()
    import main

    times = Times(folder)
    times.clock.end()
    clock_parts(main, times)
    try:
        main.main(flags)
    finally:
        times.write()


if __name__ == "__main__":
    from qat.errors import reported_in_one_line

    with reported_in_one_line():
        run(Path(sys.argv[1]), sys.argv[2:])
