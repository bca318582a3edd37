"""The manifest of a checkpoint: names, sizes and checksums of its files, written last.

A folder without one was not written to its end; a file that is missing, shorter or changed is found by it. The
processes of a run divide the reading: each takes every n-th file.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import xxhash

from ..errors import UserError

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 22


def describe(folder: Path, index: int = 0, count: int = 1) -> dict[str, dict]:
    """Every `count`-th file of `folder` from the `index`-th on: its name -> {"bytes", "xxh3_128"}."""
    names = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    return {name: _entry(folder / name) for name in names[index::count] if name != MANIFEST_NAME}


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Write `files`, as `describe` gives them for all processes together, to `folder`."""
    content = {"format_version": _FORMAT_VERSION, "files": dict(sorted(files.items()))}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def problems(folder: Path, index: int = 0, count: int = 1) -> list[str]:
    """List the faults of every `count`-th file in the manifest of `folder`; empty if there are none.

    Files that the manifest does not name are somebody else's and are not looked at.
    """
    try:
        files = _read(folder / MANIFEST_NAME)
    except FileNotFoundError:
        return [f"it has no {MANIFEST_NAME}, so it was not written to its end by this program"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"its {MANIFEST_NAME} is damaged ({error})"]
    found = (_problem(folder / name, name, entry) for name, entry in list(files.items())[index::count])
    return [problem for problem in found if problem is not None]


def _read(path: Path) -> dict[str, dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format_version"] != _FORMAT_VERSION:
        raise UserError(f"format_version is {content['format_version']}, this program reads {_FORMAT_VERSION}")
    for name, entry in content["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"it names {name!r}, which lies outside")
        int(entry["bytes"]), str(entry["xxh3_128"])
    return content["files"]


def _problem(path: Path, name: str, entry: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if _checksum(path) != entry["xxh3_128"]:
            return f"{name} has changed (its checksum is another)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
