"""Limits of time and memory for code that comes with data or a model: chat templates may loop, or fill the memory.

The time is that of this thread on a core, so a machine under load makes no template fail. The limits need the main
thread (signals) and Linux or another Unix; elsewhere there are none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 3.0
BYTES = 1 << 30


class TookTooLong(Exception):
    """The time limit was reached."""


class LimitedTime:
    """Raise TookTooLong inside of a step that computes for about SECONDS.

    One timer serves many steps, as clocks and timers cost more than a short step: at each of its ticks, the step is
    looked at. A single operation of C code is not interrupted, so what can take long in one must be limited by itself.

        with LimitedTime() as limit:
            for step in steps:
                limit.begin_step()
                ...
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = SECONDS if seconds is None else seconds
        self._step = self._seen = 0
        self._since = 0.0  # the time at the first tick within step `_seen`

    def __enter__(self) -> LimitedTime:
        self._is_on = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._is_on:
            self._previous = signal.signal(signal.SIGVTALRM, self._tick)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds / 8, self.seconds / 8)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._previous or signal.SIG_DFL)

    def begin_step(self) -> None:
        """The time of the next step begins."""
        self._step += 1

    def _tick(self, *_: object) -> None:
        now = time.thread_time()  # the timer counts other threads, too
        if self._step != self._seen:
            self._seen, self._since = self._step, now
        elif now - self._since >= self.seconds:
            self._seen = 0  # once in a step
            raise TookTooLong


@contextlib.contextmanager
def limited_memory(extra: int = BYTES) -> Iterator[None]:
    """Have allocations fail inside (MemoryError) that would take this process `extra` bytes above what it holds now."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + extra
    for bound in (soft, hard):
        limit = limit if bound == resource.RLIM_INFINITY else min(limit, bound)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
