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


@contextlib.contextmanager
def limited_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TookTooLong inside after `seconds` of computing.

    A single operation of C code is not interrupted, so what can take long in one must be limited by itself.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin = time.thread_time()

    def look(*_: object) -> None:
        if time.thread_time() - begin >= seconds:  # the timer counts other threads, too
            raise TookTooLong

    previous = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # and again: a `finally` inside must not swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous or signal.SIG_DFL)


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
