"""Write a folder under a temporary name, flush it to disk and rename it when it is complete.

So no process ever sees a part of it. For a target `NAME`, the temporary folders `.NAME.partial` (being written) and
`.NAME.replaced` (what it replaces) lie beside it; the next process with the same target removes what a killed process
left of them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import DISK_FULL, DiskFullError, UserError

logger = logging.getLogger(__name__)


@contextmanager
def written_atomically(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that replaces it on success and is removed on any error.

    Raises:
        UserError: `target` is a file, or a folder that must not be replaced.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    partial = partial_of(target)
    created = next((p for p in reversed(target.parents) if not p.exists()), partial)
    clear_leftovers(target)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_to_disk(partial)
        put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(created, ignore_errors=True)
        raise


def partial_of(target: Path) -> Path:
    """Where `target` is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


def _replaced_by(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def clear_leftovers(target: Path) -> None:
    """Remove what a killed process left of writing `target`; restore what it was about to replace."""
    partial, replaced = partial_of(target), _replaced_by(target)
    if replaced.exists() and not target.exists():
        logger.warning("restoring %s, which a killed process was replacing", target)
        replaced.rename(target)
    for leftover in (partial, replaced):
        if leftover.exists():
            logger.warning("removing %s, left by a process that was killed", leftover)
            shutil.rmtree(leftover)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename the complete folder `partial` to `target`, replacing what is there."""
    replaced = _replaced_by(target)
    if target.exists():
        target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    flush_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_to_disk(folder: Path) -> None:
    """Have the operating system write all files of `folder` and their names to disk: a power cut loses none."""
    for path in folder.rglob("*"):
        flush_path(path)
    flush_path(folder)


def flush_path(path: Path) -> None:
    """The same for one file, or for the names in one folder (which some file systems refuse)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise a UserError for a file, for a non-empty folder, and for one to overwrite that holds no checkpoint."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a new folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists and is not empty; give another folder, or overwrite it (--overwrite)")
    if not (target / "config.json").is_file():
        raise UserError(f"{target} holds no checkpoint (no config.json), so it is not overwritten; remove it yourself")


@contextmanager
def disk_full_reported(target: str | Path, setting: str = "") -> Iterator[None]:
    """Raise one DiskFullError for a full disk, whether safetensors, torch, Arrow or Python met it.

    Args:
        target: what is written, of which the block leaves nothing incomplete.
        setting: the argument that chooses where it lies, such as "--output_dir".
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if not means_full(error):
            raise
        remedy = f", or give another {setting}" if setting else ""
        raise DiskFullError(
            f"the disk is full, nothing was left incomplete at {target} ({error}); free some space{remedy}"
        ) from error


def means_full(error: Exception) -> bool:
    """Whether an error says that no space is left: on the disk, in a quota, or below a limit of file sizes."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    # safetensors and torch.save have no errno; torch's writer fails when space runs out, or when the device fails.
    signs = ("os error 28", "os error 27", "os error 122", "StreamWriter", "inline_container.cc", "iostream error")
    return any(sign in str(error) for sign in signs)
