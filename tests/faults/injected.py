"""Faults, as objects that a run's process calls before `main`; each does the real thing to its own process.

Where a fault strikes is counted in operations on the file system below some folder (every open, rename, mkdir and
removal that Python makes is one), in training steps, or in seconds.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def _strike(signum: int) -> None:
    os.kill(os.getpid(), signum)


@dataclass(frozen=True)
class AfterSeconds:
    """A signal so many seconds after `main` began."""

    seconds: float
    signum: int = signal.SIGKILL
    rank: int = 0

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            timer = threading.Timer(self.seconds, _strike, (self.signum,))
            timer.daemon = True
            timer.start()


@dataclass(frozen=True)
class AtOperation:
    """A signal before the n-th operation on files whose path contains `text`, or `delay` seconds after it began."""

    text: str
    number: int
    delay: float = 0.0
    rank: int = 0
    signum: int = signal.SIGKILL

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            _watch(self.text, lambda n: n == self.number and _strike_later(self.signum, self.delay))


@dataclass(frozen=True)
class AtProcess:
    """A signal so many seconds after the n-th process of an export's proof was started."""

    number: int
    delay: float
    signum: int = signal.SIGKILL

    def __call__(self, rank: int) -> None:
        count = [0]

        def hook(event: str, arguments: tuple) -> None:
            if event == "subprocess.Popen" and "qat.checkpoints.verify_logits" in arguments[1]:
                count[0] += 1
                if count[0] == self.number:
                    _strike_later(self.signum, self.delay)

        sys.addaudithook(hook)


@dataclass(frozen=True)
class CountOperations:
    """No fault: writes to `result` the number of operations that AtOperation would count, and the seconds of `main`."""

    text: str
    result: str

    def __call__(self, rank: int) -> None:
        import main

        count, began, run = [0], time.monotonic(), main.main
        _watch(self.text, lambda n: count.__setitem__(0, n))

        def counted(argv: list[str]) -> None:
            run(argv)
            Path(self.result).write_text(f"{count[0]} {time.monotonic() - began}")

        main.main = counted


def _watch(text: str, act) -> None:
    """Call `act` with 1, 2, 3, ... before the operations on files whose path contains `text`."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in _OPERATIONS and any(text in os.fspath(a) for a in arguments[:2] if isinstance(a, str | Path)):
            count[0] += 1
            act(count[0])

    sys.addaudithook(hook)


@dataclass(frozen=True)
class AtStep:
    """A signal in the n-th batch of training, counted from this process's start, `delay` seconds after it began."""

    number: int
    signum: int = signal.SIGKILL
    delay: float = 0.0
    rank: int = 0

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            _before_batch(self.number, lambda loss: _strike_later(self.signum, self.delay) or loss)


def _strike_later(signum: int, delay: float) -> None:
    if delay:
        AfterSeconds(delay, signum)(0)
    else:
        _strike(signum)


@dataclass(frozen=True)
class AtEvaluation:
    """A signal in the n-th batch that is evaluated, counted from this process's start, `delay` seconds after it began.

    Attributes:
        seconds: how long each batch takes at least.
    """

    number: int
    signum: int = signal.SIGTERM
    delay: float = 0.0
    rank: int = 0
    seconds: float = 0.0

    def __call__(self, rank: int) -> None:
        from training.trainer import QATTrainer

        seen = [0]
        predict = QATTrainer.prediction_step

        def prediction_step(self_, *args, **kwargs):
            seen[0] += 1
            if rank == self.rank and seen[0] == self.number:
                _strike_later(self.signum, self.delay)
            time.sleep(self.seconds)
            return predict(self_, *args, **kwargs)

        QATTrainer.prediction_step = prediction_step


@dataclass(frozen=True)
class NanLoss:
    """A loss of NaN, and gradients made of it, in so many batches of training from the n-th on."""

    number: int
    count: int = 1

    def __call__(self, rank: int) -> None:
        for number in range(self.number, self.number + self.count):
            _before_batch(number, lambda loss: loss * float("nan"))


def _before_batch(number: int, act) -> None:
    """Let `act` turn the loss of the n-th batch into another, before the backward pass."""
    from training.trainer import QATTrainer

    seen = [0]
    compute = QATTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        seen[0] += model.training
        return act(loss) if seen[0] == number and model.training else loss

    QATTrainer.compute_loss = compute_loss


@dataclass(frozen=True)
class FileSizeLimit:
    """No file can grow beyond so many bytes: writes fail as on a full disk."""

    size_bytes: int

    def __call__(self, rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size_bytes, self.size_bytes))


@dataclass(frozen=True)
class Unprivileged:
    """The process gives up root, to whom every folder is writable."""

    def __call__(self, rank: int) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
