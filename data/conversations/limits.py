"""Limits of time and memory for code that comes with data or a model: chat templates may loop, or fill the memory.

The time is that of this process on its cores (user time), so a machine under load makes no template fail. The limits
need the main thread (signals) and Linux or another Unix; elsewhere there are none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
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
    previous = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a `finally` inside must not swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous or signal.SIG_DFL)


def _too_long(*_: object) -> None:
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
