"""Paths that a user gives, checked before any work: places to write, and that they are apart from what is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

_PROBE_BYTES = 4096


def check_apart(argument: str, output: str | Path, inputs: Iterable[tuple[str, str | Path]]) -> None:
    """Refuse to write where something is read: what is read would be changed, or what is written be read next time.

    Args:
        argument: the name of the argument that says where to write.
        output: the file or folder to write.
        inputs: the files and folders that are read, each behind its argument. Names of the hub, which no path has,
            pass.

    Raises:
        UserError: `output` is one of the inputs, contains one, or lies in one; links are followed.
    """
    place = Path(output).resolve()
    for name, given in inputs:
        if not os.path.exists(given):
            continue
        read = Path(given).resolve()
        how = (
            "is"
            if place == read
            else "contains"
            if place in read.parents
            else "lies in"
            if read in place.parents
            else ""
        )
        if how:
            raise UserError(
                f"{argument} {str(output)!r} {how} {name} {str(given)!r}, which would be overwritten or read again; "
                "give another folder"
            )


@contextmanager
def made_writable(argument: str, folder: str | Path) -> Iterator[None]:
    """Make `folder` if it is missing, and try to write there; where the block fails, remove it if it is still empty.

    Folders that were there before stay, and so does one that anything was written to.

    Raises:
        UserError: nothing can be written there.
    """
    with _named(argument, folder):
        made = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with _named(argument, folder):
            _try(Path(folder))
        yield
    except BaseException:
        with suppress(OSError):  # not empty, or another process was first
            for path in made:
                path.rmdir()
        raise


def check_writable(argument: str, folder: str | Path) -> None:
    """Try to write in `folder`, or to make it where it is missing; nothing is left.

    Raises:
        UserError: nothing can be written there.
    """
    with _named(argument, folder):
        path = Path(folder).absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if there == path:
            _try(path)
            return
        with tempfile.TemporaryDirectory(dir=there) as temporary:
            new = Path(temporary, path.relative_to(there))
            new.mkdir(parents=True)
            _try(new)


@contextmanager
def _named(argument: str, folder: str | Path) -> Iterator[None]:
    """Name the argument and its value where the operating system refuses."""
    if not str(folder).strip():
        raise UserError(f"{argument} is empty; give a folder to write to")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{argument} {str(folder)!r} cannot be written ({reason}); give a folder that can") from error


def _try(folder: Path) -> None:
    """Write a few bytes in a folder that exists."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"0" * _PROBE_BYTES)
        probe.flush()


def check_writable_file(argument: str, path: str | Path) -> None:
    """Refuse a file that cannot be written: one in a missing folder, a folder itself, one without permission.

    Raises:
        UserError: as described.
    """
    path = Path(path)
    if not str(path).strip() or path.is_dir():
        raise UserError(f"{argument} {str(path)!r} is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{argument} {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{argument} {str(path)!r} cannot be written; give another file")
