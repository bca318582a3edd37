"""Build a folder once, under a key, however many processes ask for it at the same time.

A folder is built under another name and renamed when it is complete, so a crash leaves no incomplete one. A lock that
the operating system frees when its holder dies lets one process build while the others wait. On a file system without
locks two machines may build the same folder: the first rename wins, the other result is deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import filelock

from ..errors import DiskFullError, UserError
from .atomic import disk_full_reported, flush_to_disk, means_full

logger = logging.getLogger(__name__)


def build_once(root: Path, key: str, build: Callable[[Path], None], setting: str = "--data_cache_dir") -> Path:
    """The folder `root/key`; if there is none, `build` fills it.

    Args:
        build: gets an empty folder; if it raises, nothing is kept.
        setting: the argument that chooses `root`.

    Raises:
        UserError: `root` cannot be written.
        DiskFullError: no space is left for the folder.
    """
    folder = root / key
    if folder.is_dir():
        return folder
    lock = _acquire(root, key, setting)
    try:
        if not folder.is_dir():
            if lock.is_locked:
                _remove_remains(root, key)
            with disk_full_reported(folder, setting):
                _build(folder, build)
    finally:
        lock.release()
    return folder


def _acquire(root: Path, key: str, setting: str) -> filelock.BaseFileLock:
    lock = filelock.FileLock(root / f"{key}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            logger.info("another process is building %s; waiting for it", root / key)
            lock.acquire()
    except NotImplementedError:
        logger.warning("the file system of %s has no locks, so every process builds the folder", root)
    except OSError as error:
        if means_full(error):
            raise DiskFullError(
                f"the disk is full, the cache {root} cannot be written ({error}); free some space, or give another "
                f"{setting}"
            ) from error
        raise UserError(f"the cache {root} cannot be written ({error.strerror}); give another {setting}") from error
    return lock


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        build(partial)
        flush_to_disk(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another machine was first, on a file system whose locks do not work across machines.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_remains(root: Path, key: str) -> None:
    """Delete what processes of this machine left when they were killed; we hold the lock, so none of them is alive."""
    for path in root.glob(f"{key}.partial-{socket.gethostname()}-*"):
        logger.info("removing %s, which a crash left behind", path)
        shutil.rmtree(path, ignore_errors=True)
