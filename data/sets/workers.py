"""Workers: processes that call one function, whose results come in order and who never outlive this process.

Each worker has a pipe and a thread of its own here, so the death of a worker ends one `recv` and blocks nothing.
(concurrent.futures, in Python 3.11, hangs if a worker is killed while it writes a result.)
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from qat.errors import RunFault, UserError
from qat.processes import start_worker


class Workers:
    """Processes that call `function`; use it in a `with` block, at whose end they are killed, whatever they do.

    Args:
        function: of one argument; it, its argument and its result travel between processes.
        count: of processes.
    """

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        # Forked, as `datasets.map` does: a spawned worker would import the main program again.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.count, self._processes = count, []
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid(), function), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(count)  # after the last fork

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()
        while not self._idle.empty():
            self._idle.get().close()

    def map(self, items: Iterable) -> Iterator:
        """The results of all items, in order; a few are computed ahead, so that a slow reader is not flooded.

        Raises:
            RunFault: a worker was killed. What `function` raises is raised here, too.
        """
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(self._threads.submit(self._call, item))
            if len(waiting) >= 3 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _call(self, item: Any) -> Any:
        worker = self._idle.get()
        try:
            worker.send(item)
            error, result = worker.recv()
        except (EOFError, OSError) as gone:
            raise RunFault(
                "a process that tokenizes was killed, most likely because memory ran out; give fewer of them "
                "(--preprocessing_num_workers)"
            ) from gone
        finally:
            self._idle.put(worker)
        if error is not None:
            raise error
        return result


def _work(connection: Connection, parent: int, function: Callable[[Any], Any]) -> None:
    start_worker(parent)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = None, function(item)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            answer = error, None
        connection.send(answer)
