"""Write a folder aside and rename it when it is complete, so that nobody ever sees half of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def written_aside(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place on success and vanishes on any error.

    What a killed process left (`.NAME.partial`) is removed by the next one with the same target.

    Raises:
        ValueError: `target` is a file, or a folder that must not be replaced.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    partial, replaced = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")
    created = next((p for p in reversed(target.parents) if not p.exists()), partial)
    for leftover in (partial, replaced):
        if leftover.exists():
            logger.warning("removing %s, left by an export that was killed", leftover)
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(created, ignore_errors=True)
        raise


def check_target(target: Path, overwrite: bool) -> None:
    """Raise a ValueError where nothing may be written: a file, a non-empty folder, or no checkpoint to overwrite."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} exists and is not empty; name another folder, or overwrite it (--overwrite)")
    if not (target / "config.json").is_file():
        raise ValueError(f"{target} holds no checkpoint (no config.json), so it is not overwritten; remove it yourself")
