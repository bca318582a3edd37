"""Run main.py with a clock: seconds of wall time by phase, from the start of the process to the return of `main`.

    python benchmarks/phases.py BEGAN PHASES.json ROOT ARGUMENTS OF main.py

`BEGAN` is the time (`time.time()`) at which the process was started, `ROOT` the folder of main.py. Functions that begin
a phase are replaced by ones that tell the clock; nothing else of a run changes. A phase inside another one is not
counted twice. The GPU is waited for at each change of the phase.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.clock import REST, Clock  # noqa: E402

sys.path.pop(0)  # ROOT may be another copy, all of whose modules are its own

IMPORTS, FIRST_STEP, STEPS, EXIT = "imports", "first step", "other steps", "exit"
# Functions that begin a phase, by the modules that call them.
FUNCTIONS = {
    "arguments and checks": (
        "main:parse_arguments", "main:set_up", "main:check_paths", "main:Start.read", "main:Start.check",
        "main:check_model", "main:check_data",
    ),
    "data": ("main:Start.load_tokenizer", "main:make_supervised_data_module"),
    "estimate of the memory": ("main:short_form",),
    "weights read": ("training.start.start:load_unquantized", "training.start.start:load_packed"),
    "masters, fingerprint": ("main:Start.load_model",),
    "teacher": ("main:choose_teacher", "main:cached_where_asked"),
    "quantized": ("main:Start.quantize",),
    "smoothing, calibration": (
        "training.start.weights:smooth_with_data", "training.start.weights:compensate_with_data",
        "main:calibrate_with_data",
    ),
    "trainer": ("main:QATTrainer.__init__", "main:train"),
    "checkpoints": ("main:QATTrainer._save_checkpoint",),
    "evaluation": ("main:evaluate",),
    "final model": ("main:save",),
    "report": ("main:report_run",),
    "export": ("training.resume.output:export_checkpoint",),
    "proof: weights": ("training.resume.output:verify",),
    "proof: logits": ("qat.checkpoints.verify:LogitsProof.finish",),
    "table of engines": ("main:table_of_folder",),
}  # fmt: skip
_BEFORE_STEPS = 1 + list(FUNCTIONS).index("trainer")
PHASES = (
    IMPORTS, *[*FUNCTIONS][:_BEFORE_STEPS], FIRST_STEP, STEPS, *[*FUNCTIONS][_BEFORE_STEPS:], REST, EXIT,
)  # fmt: skip


def follow(clock: Clock) -> None:
    """Let every function of FUNCTIONS tell the clock, and the Trainer's steps."""
    for phase, names in FUNCTIONS.items():
        for name in names:
            owner, attribute = owner_of(name)
            clock.follow(owner, attribute, phase)
    handler, steps = import_module("transformers.trainer_callback").CallbackHandler, iter([FIRST_STEP])
    begin, end = handler.on_step_begin, handler.on_step_end

    def on_step_begin(*args: Any, **kwargs: Any) -> Any:
        clock.begin(next(steps, STEPS))
        return begin(*args, **kwargs)

    def on_step_end(*args: Any, **kwargs: Any) -> Any:
        result = end(*args, **kwargs)
        clock.end()
        return result

    handler.on_step_begin, handler.on_step_end = on_step_begin, on_step_end


def owner_of(name: str) -> tuple[Any, str]:
    """The module or class, and the attribute, of "module:function" or "module:Class.method".

    Raises:
        AttributeError: it has no such function any more; FUNCTIONS must follow.
    """
    module, _, path = name.partition(":")
    owner: Any = import_module(module)
    *classes, attribute = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    getattr(owner, attribute)
    return owner, attribute


def main(began: str, out: str, root: str, *arguments: str) -> None:
    """Run main.py; what it has counted is in `out` when it returns."""
    sys.path.insert(0, root)
    clock = Clock(float(began), IMPORTS)
    import main as program
    from qat.errors import reported_in_one_line

    follow(clock)
    sys.argv = ["main.py", *arguments]
    with reported_in_one_line():
        with clock.phase(REST):
            program.main()
        clock.seconds["returned"] = time.time()
        Path(out).write_text(json.dumps(clock.seconds), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
