"""StepGuard: end a training between two steps, on all processes, after SIGTERM or non-finite values.

SIGTERM (a cluster takes its machine back) lets the step end, has a checkpoint written and stops the training; the
program then exits with `INTERRUPTED`. A step whose loss or gradient is NaN or infinite is not applied; more than
`max_nan_steps` of them in a row end the run, whose checkpoints stay as good as they were.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .written import checkpoints_in

logger = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGTERM  # 143, the exit status of a program that SIGTERM ended


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the weights have become NaN or infinite."""


class StepGuard(TrainerCallback):
    """Check each step before the optimizer applies it.

    Attributes:
        interrupted: whether SIGTERM is ending the training; the same on all processes from the end of a step on.
        nan_steps: steps in a row that were not applied.
    """

    def __init__(self, max_nan_steps: int = 0) -> None:
        self.max_nan_steps, self.nan_steps = max_nan_steps, 0
        self.interrupted = self._signalled = False
        self._seen: list[torch.Tensor] = []

    @property
    def withholds(self) -> bool:
        """Whether the current step is not applied; known once the optimizer is about to step."""
        return self.nan_steps > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat SIGTERM as a request to stop after the step; only a main thread can."""
        self.interrupted = self._signalled = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _receive(self, signum, frame) -> None:
        self._signalled = True

    def see(self, value: torch.Tensor | float | None) -> None:
        """Record a loss or a gradient norm of the current step."""
        if value is not None:
            self._seen.append(torch.as_tensor(value).detach())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Withhold the gradient of a step with non-finite values; raise NonFiniteError after too many."""
        seen = [value.to(args.device, torch.float32) for value in self._seen]
        self._seen = []
        finite = bool(torch.stack(seen).isfinite().all()) if seen else True
        nan, self.interrupted = _any_process((not finite, self._signalled), args)
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

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save and stop where SIGTERM asked for it."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def _any_process(flags: tuple[bool, ...], args) -> list[bool]:
    """Each flag, raised on any of the processes."""
    if args.world_size <= 1 or not dist.is_initialized():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32, device=args.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def _complaint(output_dir: str, step: int, values: str, guard: StepGuard) -> str:
    checkpoints = checkpoints_in(output_dir)
    last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return (
        f"step {step}: loss and gradient norm are {values} on this process, for {guard.nan_steps} steps in a row, and "
        f"--max_nan_steps is {guard.max_nan_steps}. None of these steps was applied; {last}. Look at the data of this "
        "step, lower --learning_rate, or let more such steps pass with --max_nan_steps"
    )


@torch.no_grad()
def check_weights(model: torch.nn.Module, args) -> None:
    """Raise NonFiniteError where a weight is NaN or infinite on any process: such a checkpoint would be of no use."""
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(_local(p)).all()]
    if _any_process((bool(bad),), args)[0]:
        where = f"{bad[0]} and {len(bad) - 1} more" if bad else "weights of another process"
        raise NonFiniteError(f"{where} have become NaN or infinite; no checkpoint is written. Lower --learning_rate")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
