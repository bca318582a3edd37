"""A lock on an output folder: of two runs that would write to the same one, the second is refused at once.

The kernel holds it for a process: it is released when the process ends, however it ends. Children do not inherit it.
(It is also released when that process opens and closes the file once more: nothing here does.)
It works across machines where the locks of their file system do. The file `_run.lock` names the holder; a file that a
killed run left has no effect. Trainer sends no file whose name begins with _ to the Hub.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]  # a module everywhere else

logger = logging.getLogger(__name__)

LOCK_NAME = "_run.lock"


class Writers(Protocol):
    """The processes that share a folder: whether this one leads, and how they exchange messages."""

    @property
    def leads(self) -> bool: ...

    def gather(self, item: Any) -> list: ...


@contextmanager
def locked(folder: Path, writers: Writers) -> Iterator[None]:
    """Hold `folder` until the end of the block; the process that leads does so for all.

    Raises:
        UserError: on all processes; another run holds the folder, or it cannot be written.
    """
    lock, complaint = _Lock(folder / LOCK_NAME), None
    try:
        if writers.leads:
            complaint = lock.take()
        if complaints := [text for text in writers.gather(complaint) if text]:
            raise UserError(complaints[0])
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def take(self) -> str | None:
        """Take the lock; returns an error message, or None (also where there are no locks, which is logged)."""
        output_dir = f"--output_dir {str(self.path.parent)!r}"
        try:
            self._try()
        except (BlockingIOError, PermissionError) as error:
            if error.filename is None:  # from locking, not from opening
                return (
                    f"{output_dir} is in use by another run ({self._holder()}); wait for its end, or end it, or give "
                    "another --output_dir"
                )
            return f"{output_dir} cannot be locked ({error}); remove that file, or give another --output_dir"
        except OSError as error:
            logger.warning("%s has no locks (%s); make sure that no other run writes there", output_dir, error.strerror)
        return None

    def _try(self) -> None:
        while self.descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
            except OSError:
                os.close(descriptor)
                raise
            if _is_at(descriptor, self.path):
                self.descriptor = descriptor
            else:  # the holder ended, and removed the file, after it was opened here
                os.close(descriptor)
        with suppress(OSError):  # a full disk
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _holder(self) -> str:
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace") or "it has just begun"
        return "it has just ended"

    def release(self) -> None:
        """Free the folder, if this process holds it."""
        if self.descriptor is not None:
            with suppress(OSError):
                if _is_at(self.descriptor, self.path):  # else it was removed, and what is there is another's
                    self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = None


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
