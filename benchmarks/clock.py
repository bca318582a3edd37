"""Clock: the time of a run by what its functions do, as seconds of phases and as intervals.

It imports nothing but the standard library, so that the imports of main.py can be a phase. The GPU is waited for
wherever a phase begins or ends.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import getattr_static
from typing import Any

REST = "all else"


class Clock:
    """Phases of a run, from the thread that made the clock; those of other threads are intervals only.

    Attributes:
        seconds: by phase; of nested phases the inner one counts.
        intervals: [begin, end] of each phase, in seconds since the epoch, with what is nested in it; the last one, if
            it happened several times.

    Args:
        began: when the first phase began, in seconds since the epoch.
        first: its name.
    """

    def __init__(self, began: float, first: str) -> None:
        self.seconds: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self._last, self._running = began, [(first, began)]
        self._thread = threading.get_ident()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        if threading.get_ident() != self._thread:
            begin = time.time()
            yield
            self.intervals[name] = [begin, time.time()]
            return
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Let a phase begin, inside the one that runs."""
        self._running.append((name, self._count()))

    def end(self) -> None:
        """Return to the phase outside; behind the first one is `REST`."""
        now = self._count()
        name, begin = self._running.pop()
        self.intervals[name] = [begin, now]
        if not self._running:
            self._running.append((REST, now))

    def follow(self, owner: Any, attribute: str, name: str, after: Callable[[], object] | None = None) -> None:
        """Replace a function of a module or a class by one that is the phase `name` whenever it is called.

        Args:
            after: is called at the end of each.
        """
        setattr(owner, attribute, self._counted(getattr_static(owner, attribute), name, after))

    def _counted(self, function: Any, name: str, after: Callable[[], object] | None) -> Any:
        if isinstance(function, classmethod):
            return classmethod(self._counted(function.__func__, name, after))
        plain: Callable = function

        @wraps(plain)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                result = plain(*args, **kwargs)
            if after is not None:
                after()
            return result

        return counted

    def _count(self) -> float:
        wait_for_gpu()
        now = time.time()
        name = self._running[-1][0]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        return now


def wait_for_gpu() -> None:
    """Wait for the work of the GPU, if this process has begun to use one."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.synchronize()
