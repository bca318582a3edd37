"""Several tensors on their way at once: one is read while another is computed with and a third is written.

Reading a mapped file, copying to and from a device, kernels, writing and flushing all release Python's lock, so plain
threads overlap them. Each takes a tensor all the way, which bounds the memory by the number of threads, not by the
size of a file.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU = torch.device("cpu")
_STARTING = threading.Lock()
_THREADS = {"cpu": 2, "cuda": 6}  # on a CPU the kernels have threads of their own


def threads_for(device: torch.device) -> int:
    """How many tensors are on their way at once."""
    return max(1, min(_THREADS[device.type], os.cpu_count() or 1))


def one_at_a_time(device: torch.device) -> AbstractContextManager:
    """Let one thread at a time start kernels of ours on a GPU: Triton compiles and tunes one when it first meets it."""
    return nullcontext() if device.type == "cpu" else _STARTING


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], device: torch.device, threads: int | None = None
) -> Iterator[Result]:
    """The results of `work`, in the order of the items, without gradients; `items` are taken as threads get free.

    Args:
        device: that `work` computes on; on a GPU each thread has a stream of its own, and all of their work is done
            when the iterator ends.
        threads: default: `threads_for(device)`.

    Raises:
        Exception: the error of the first item that has one; what has not begun by then is left out.
    """
    threads = threads or threads_for(device)
    streams: deque = deque(torch.cuda.Stream(device) for _ in range(threads)) if device.type == "cuda" else deque()

    @torch.no_grad()
    def run(item: Item) -> Result:
        if not streams:
            return work(item)
        stream = streams.popleft()  # there are as many as threads
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                return work(item)
        finally:
            streams.append(stream)

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was made on another stream is there
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(run, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
