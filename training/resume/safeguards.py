"""StepGuard: end a run between two steps or two batches of an evaluation, on all processes together.

SIGTERM (a cluster takes its machine back) and Ctrl-C let the step end, have a checkpoint written and stop the training;
an evaluation stops after the batch. The program then exits with 143 or 130. A step whose loss or gradient is NaN or
infinite is not applied; more than `max_nan_steps` of them in a row end the run, whose checkpoints stay as good as they
were.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from qat.checkpoints.fit import is_finite
from qat.errors import RunFault
from qat.processes import ENDING, Signalled, is_ending

from .written import checkpoints_in

logger = logging.getLogger(__name__)


class NonFiniteError(RunFault, RuntimeError):
    """The loss, the gradient or the weights have become NaN or infinite."""


class StepGuard(TrainerCallback):
    """Check each step before the optimizer applies it, and each batch of an evaluation.

    Attributes:
        signum: of the signal that is ending the run, 0 if none is; the same on all processes.
        nan_steps: steps in a row that were not applied.
        steps_in_backward: whether a gradient is applied before the guard sees it, so that it can end the run only.
    """

    def __init__(self, max_nan_steps: int = 0, steps_in_backward: bool = False) -> None:
        self.max_nan_steps, self.nan_steps = max_nan_steps, 0
        self.steps_in_backward = steps_in_backward
        self.signum = self._received = 0
        self._listens = self._waits = False
        self._previous: dict = {}
        self._seen: list[torch.Tensor] = []

    @property
    def interrupted(self) -> bool:
        """Whether a signal is ending the run."""
        return self.signum > 0

    @property
    def withholds(self) -> bool:
        """Whether the current step is not applied; known once the optimizer is about to step."""
        return self.nan_steps > 0

    # ---- Signals ----

    @contextmanager
    def listening(self, waits: bool = False) -> Iterator[None]:
        """Treat SIGTERM and Ctrl-C as requests to stop at the next boundary; a second Ctrl-C ends the program at once.

        Only a main thread can receive signals. A block inside another one changes nothing.

        Args:
            waits: for a boundary from the beginning on; otherwise from the first step on: before it there is nothing
                to save, and a signal has the effect that it had outside.
        """
        if self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signum = self._received = 0
        self._listens, self._waits = True, waits
        self._previous = {signum: signal.signal(signum, self._receive) for signum in ENDING}
        try:
            yield
        finally:
            self._listens = False
            self._restore()

    def _receive(self, signum: int, frame) -> None:
        if not self._waits:
            self._restore()
            signal.raise_signal(signum)
            return
        self._received = signum
        is_ending()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check_evaluation(self, args) -> None:
        """Raise `Signalled` on all processes where one of them has received a signal. All of them must call it."""
        if not self._listens:
            return
        (self.signum,) = largest_of_processes((self._received,), args)
        if self.interrupted:
            raise Signalled(self.signum)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """From now on there is a step to end and to save."""
        self._waits = True

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """Stop an evaluation after a batch."""
        self.check_evaluation(args)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save and stop where a signal asked for it."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """Stop after a checkpoint during which a signal came; the next step would have to be saved again."""
        if self._listens:
            (self.signum,) = largest_of_processes((self._received,), args)
        if self.interrupted:
            control.should_training_stop = True

    # ---- Non-finite values ----

    def see(self, value: torch.Tensor | float | None) -> None:
        """Record a loss or a gradient norm of the current step."""
        if value is not None:
            self._seen.append(torch.as_tensor(value).detach())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Withhold the gradient of a step with non-finite values; raise NonFiniteError after too many."""
        seen = [value.to(args.device, torch.float32) for value in self._seen]
        self._seen = []
        finite = bool(torch.stack(seen).isfinite().all()) if seen else True
        nan, self.signum = largest_of_processes((not finite, self._received), args)
        if not nan:
            self.nan_steps = 0
            return
        self.nan_steps += 1
        values = ", ".join(f"{value:g}" for value in seen)
        if self.nan_steps > self.max_nan_steps:
            raise NonFiniteError(_complaint(args.output_dir, state.global_step + 1, values, self))
        logger.warning(
            "step %d is not applied: loss and gradient norm are %s on this process (%d in a row; --max_nan_steps %d)",
            state.global_step + 1, values, self.nan_steps, self.max_nan_steps,
        )  # fmt: skip
        model.zero_grad(set_to_none=True)  # parameters without a gradient are skipped by the optimizer


def largest_of_processes(numbers: Sequence[int], args) -> list[int]:
    """The largest value of each number on any of the processes."""
    if args.world_size <= 1 or not dist.is_initialized():
        return [int(number) for number in numbers]
    tensor = torch.tensor(numbers, dtype=torch.int32, device=args.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _complaint(output_dir: str, step: int, values: str, guard: StepGuard) -> str:
    checkpoints = checkpoints_in(output_dir)
    if guard.steps_in_backward:
        return (
            f"step {step}: loss and gradient norm are {values} on this process, and with --optimizer_in_backward True "
            f"gradients were applied before that was seen. Nothing of this step is saved; "
            f"{_last(checkpoints)}. Look at the data of this step, lower --learning_rate, or leave "
            "--optimizer_in_backward out: then such steps are withheld"
        )
    return (
        f"step {step}: loss and gradient norm are {values} on this process, for {guard.nan_steps} steps in a row, and "
        f"--max_nan_steps is {guard.max_nan_steps}. None of these steps was applied; {_last(checkpoints)}. Look at the "
        "data of this step, lower --learning_rate, or let more such steps pass with --max_nan_steps"
    )


def _last(checkpoints: Sequence) -> str:
    return f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"


@torch.no_grad()
def check_weights(model: torch.nn.Module, args) -> None:
    """Raise NonFiniteError where a weight is NaN or infinite on any process: such a checkpoint would be of no use."""
    bad = [name for name, p in model.named_parameters() if not is_finite(_local(p))]
    if largest_of_processes((bool(bad),), args)[0]:
        where = f"{bad[0]} and {len(bad) - 1} more" if bad else "weights of another process"
        raise NonFiniteError(f"{where} have become NaN or infinite; no checkpoint is written. Lower --learning_rate")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
