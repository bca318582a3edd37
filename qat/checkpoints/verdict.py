"""The verdict of a proof, `verification.json` in the packed folder: taken back, written, and the source that it names.

A proof that stops early must not leave the verdict of an earlier one, which was about files that may have been others.
It leaves the source, so that the next proof finds it again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import disk_full_reported
from ..files.json_file import read_object
from .folder import CONFIG_NAME

VERDICT_NAME = "verification.json"
UNFINISHED = "the comparison did not come to its end"


def source_from(folder: Path, source: Path) -> str:
    """The source as the verdict in `folder` names it: relative, so that both can be moved together."""
    return os.path.relpath(source.resolve(), folder.resolve())


def recorded_source(folder: Path) -> Path:
    """The source that the verdict in `folder` names.

    Raises:
        UserError: there is none, or it is no longer there.
    """
    path = folder / VERDICT_NAME
    if not path.is_file():
        raise UserError(f"{folder} names no source to compare with (it has no {VERDICT_NAME}); give --source")
    recorded = folder / str(read_object(path).get("source", ""))
    if (recorded / CONFIG_NAME).is_file():
        return recorded.resolve()
    raise UserError(f"{path} names {recorded} as the source, which is not there; give --source")


def withdraw(folder: Path, source: Path | None = None) -> None:
    """Replace the verdict in `folder` by `"verified": false`, the source, and that no comparison has ended.

    Args:
        source: that is going to be compared; default: the one that the verdict names. Without either nothing is left.

    Raises:
        DiskFullError: no space is left; the old verdict is gone all the same.
    """
    path = folder / VERDICT_NAME
    named = source_from(folder, source) if source is not None else _named_source(path)
    if named is None:
        path.unlink(missing_ok=True)
        return
    try:
        write_verdict(folder, {"verified": False, "source": named, "why_not_verified": UNFINISHED})
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Write the verdict; an error leaves the one that was there.

    Raises:
        DiskFullError: no space is left.
    """
    path = folder / VERDICT_NAME
    partial = path.with_name(f".{VERDICT_NAME}.partial")
    try:
        with disk_full_reported(path):
            partial.write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _named_source(path: Path) -> str | None:
    """What a verdict names, be it there or not; None for a verdict that cannot be read."""
    try:
        named = read_object(path).get("source") if path.is_file() else None
    except UserError:
        return None
    return named if isinstance(named, str) else None
