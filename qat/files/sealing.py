"""Sealing: the checksums and the flush of a folder's files, on threads, while other files are still being written.

Writing to a disk has three parts: filling the page cache, writing it to the device, and reading the files for their
checksums. In a row they take the sum of their times, beside each other that of the longest. So a file that has grown
by 64 MiB is written to the device at once, and a complete one gets its checksum while that happens.
A checksum is that of the file as it is read back, not of what was meant to be written.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from .atomic import flush_path
from .manifest import entry_of

_THREADS = 8  # most of them wait for the disk
_GROWTH_BYTES = 1 << 26  # of a file that is being written, before it is flushed
_POLL_S = 0.02


class Sealing:
    """Flush and describe the files of `folder` while others write there. A `with` block ends its threads.

    Attributes:
        folder: whose files these are.

    Args:
        index, count: of this process among those that share the folder: it follows each `count`-th file.
    """

    def __init__(self, folder: Path, index: int = 0, count: int = 1) -> None:
        self.folder, self._index, self._count = folder, index, count
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="seal")
        self._sealed: dict[str, tuple[tuple[int, int], Future]] = {}
        self._flushes: list[Future] = []
        self._ended = threading.Event()
        self._follower = self._pool.submit(self._follow)

    def __enter__(self) -> Sealing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, names: Iterable[str]) -> None:
        """Begin with the files `names`, which are complete. One that changes all the same is read again in the end."""
        for name in sorted(names, key=lambda name: -(self.folder / name).stat().st_size):
            path = self.folder / name
            state = _state(path)
            if name not in self._sealed or self._sealed[name][0] != state:
                self._sealed[name] = (state, self._pool.submit(entry_of, path))
                self._flushes.append(self._pool.submit(flush_path, path))

    def entries(self, names: Iterable[str]) -> dict[str, dict]:
        """Wait until the files `names` are on disk; what the manifest says of each.

        Raises:
            OSError: a write to the device failed, at whatever time.
        """
        names = list(names)
        self._ended.set()
        self.begin(names)
        for flush in (self._follower, *self._flushes):
            flush.result()
        return {name: self._sealed[name][1].result() for name in names}

    def _follow(self) -> None:
        flushed_bytes: dict[Path, int] = {}
        while not self._ended.wait(_POLL_S):
            with suppress(FileNotFoundError):  # a temporary file that has its name now
                self._flush_grown(flushed_bytes)

    def _flush_grown(self, flushed_bytes: dict[Path, int]) -> None:
        """Flush each file of this process that has grown enough since it was flushed last."""
        for path in self.folder.rglob("*"):
            if zlib.crc32(path.name.encode()) % self._count != self._index:
                continue
            size = path.stat().st_size
            if size - flushed_bytes.get(path, 0) >= _GROWTH_BYTES:
                flush_path(path)
                flushed_bytes[path] = size


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
