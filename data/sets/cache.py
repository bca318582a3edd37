"""Build a folder once, under a fingerprint of everything it depends on, however many processes ask for it at once.

A folder is built under another name and renamed when it is complete, so a crash leaves no half one; a lock that the
operating system frees when its holder dies lets one process build while the others wait. On a file system without locks
two machines may build the same folder; the first rename wins and nothing breaks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import datasets
import filelock

logger = logging.getLogger(__name__)


def default_root() -> Path:
    """Beside the caches of `datasets` (HF_DATASETS_CACHE, HF_HOME)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "supervised"


def fingerprint(parts: dict) -> str:
    """32 hexadecimal digits that change with any value in `parts` (JSON values) and with the code of this package."""
    code = hashlib.blake2b()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    text = json.dumps({**parts, "code": code.hexdigest()}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def build_once(root: Path, key: str, build: Callable[[Path], None], setting: str = "--data_cache_dir") -> Path:
    """The folder `root/key`; where there is none, `build` fills it.

    Args:
        build: gets an empty folder; if it raises, nothing is kept.
        setting: the argument that chooses `root`.

    Raises:
        ValueError: `root` cannot be written.
    """
    folder = root / key
    if folder.is_dir():
        return folder
    lock = _acquire(root, key, setting)
    try:
        if not folder.is_dir():
            if lock.is_locked:
                _remove_remains(root, key)
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
            logger.info("another process is preparing this data; waiting for it (%s)", root / key)
            lock.acquire()
    except NotImplementedError:
        logger.warning("the file system of %s has no locks, so every process prepares the data for itself", root)
    except OSError as error:
        raise ValueError(f"the cache {root} cannot be written ({error.strerror}); give another {setting}") from error
    return lock


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        build(partial)
        for path in partial.iterdir():
            _to_disk(path)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another machine was first, on a file system whose locks do not reach over machines.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_remains(root: Path, key: str) -> None:
    """Delete what processes of this machine left when they were killed; we hold the lock, so they are dead."""
    for path in root.glob(f"{key}.partial-{socket.gethostname()}-*"):
        logger.info("removing %s, which a crash left behind", path)
        shutil.rmtree(path, ignore_errors=True)
