"""Processes that end together: children with their parent, and a program with the signal that asks for it.

A worker that outlives its parent keeps the parent's memory and its standard output, so whoever reads that output waits
for ever. A program that a signal kills outright leaves incomplete folders. Both are prevented here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLEAN_UP_S = 15  # torchrun kills 30 s after it has forwarded a signal
_POLL_S = 0.5
ENDING = (signal.SIGTERM, signal.SIGINT)


class Signalled(SystemExit):
    """A signal ends the program; its code is 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(status_of(signum))
        self.signum = signum


def status_of(signum: int) -> int:
    """The exit status of a program that a signal ended, as a shell has it."""
    return 128 + signum


def name_of(signum: int) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def die_with_parent(parent: int) -> None:
    """End this process when its parent ends, however that ends. Call it first in a child.

    On Linux the kernel sends SIGKILL; elsewhere a thread looks for the parent twice a second.

    Args:
        parent: process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def start_worker(parent: int) -> None:
    """Make a forked worker one that its parent ends: by its own end, or by SIGTERM. Call it first in the worker.

    Ctrl-C in a terminal reaches the workers, too; the parent decides what becomes of it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def end_by_parent_alone(parent: int) -> None:
    """Have only the parent's SIGTERM end this worker; call it first in the worker.

    torchrun and Slurm send SIGTERM to all processes of a run, so to the workers that read the batches of the step which
    their parent is going to end and save, too; and a terminal sends Ctrl-C to all. Where a process cannot ask who sent
    a signal (macOS), SIGTERM ends the worker as ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm_of, args=(parent,), daemon=True).start()


def _wait_for_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # torch takes another status for a failure


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and Ctrl-C end the program with status 143 or 130 and one line, after `finally` blocks have run.

    A second Ctrl-C ends it at once, and so does the clock where cleaning up takes more than 15 seconds. A second
    SIGTERM changes nothing: under Slurm, torchrun forwards one that its processes have received already. Only a main
    thread can receive signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, _end) for signum in ENDING}
    try:
        yield
    except Signalled as end:
        if os.environ.get("RANK", "0") == "0":
            begin_line()
            print(f"ended by {name_of(end.signum)}", file=sys.stderr, flush=True)
        raise
    finally:
        for signum, handler in previous.items():
            if signal.getsignal(signum) is _end:
                signal.signal(signum, handler)


def begin_line() -> None:
    """End the line of a progress bar on standard error, if there is one, so that a message begins a line."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if len(getattr(bars, "_instances", ())):
        print(file=sys.stderr)


def is_ending() -> None:
    """Have the next Ctrl-C end the program at once, and let a second SIGTERM pass."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(signum: int, frame: FrameType | None) -> None:
    is_ending()
    clock = threading.Timer(_CLEAN_UP_S, os._exit, (status_of(signum),))
    clock.daemon = True
    clock.start()
    raise Signalled(signum)
