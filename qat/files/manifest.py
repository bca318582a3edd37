"""The manifest of a checkpoint: names, sizes and checksums of its files, written last.

A folder without one was not written to its end; a file that is missing, shorter or changed is found by it. The
processes of a run divide the reading: each takes every n-th file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import xxhash

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 20
_LARGEST_BYTES = 1 << 26  # of a manifest: some hundred thousand files
_CHECKSUM = re.compile(r"[0-9a-f]{32}")


def describe(folder: Path, index: int = 0, count: int = 1) -> dict[str, dict]:
    """Every `count`-th file of `folder` from the `index`-th on: its name -> {"bytes", "xxh3_128"}."""
    return {name: entry_of(folder / name) for name in names_in(folder)[index::count]}


def names_in(folder: Path) -> list[str]:
    """The files that a manifest of `folder` lists, in an order that is the same on all processes."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != MANIFEST_NAME]


def entry_of(path: Path) -> dict:
    """What a manifest says of one file, which is read to its end."""
    checksum, size = _read_through(path)
    return {"bytes": size, "xxh3_128": checksum}


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Write `files`, as `describe` gives them for all processes together, to `folder`."""
    content = {"format_version": _FORMAT_VERSION, "files": dict(sorted(files.items()))}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def problems(folder: Path, index: int = 0, count: int = 1, names: Collection[str] | None = None) -> list[str]:
    """List the faults of every `count`-th file in the manifest of `folder`; empty if there are none.

    Files that the manifest does not name are somebody else's and are not looked at.

    Args:
        names: of the files to look at; default: all.
    """
    try:
        files = _read(folder / MANIFEST_NAME)
    except FileNotFoundError:
        return [f"it has no {MANIFEST_NAME}, so it was not written to its end by this program"]
    except (OSError, ValueError, RecursionError) as error:
        return [f"its {MANIFEST_NAME} is damaged ({error})"]
    wanted = [item for item in files.items() if names is None or item[0] in names]
    found = (_problem(folder / name, name, entry) for name, entry in wanted[index::count])
    return [problem for problem in found if problem is not None]


def listed(folder: Path) -> set[str]:
    """The names in the manifest of `folder`; none where it cannot be read."""
    try:
        return set(_read(folder / MANIFEST_NAME))
    except (OSError, ValueError, RecursionError):
        return set()


def _read(path: Path) -> dict[str, dict]:
    """The files in a manifest, every value of which has the form that `write_manifest` gives it.

    Raises:
        ValueError: it has another form. RecursionError: it is nested without end. OSError: it cannot be read.
    """
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it has no list of files")
    if content.get("format_version") != _FORMAT_VERSION:
        raise ValueError(f"format_version is {content.get('format_version')}, this program reads {_FORMAT_VERSION}")
    if not content["files"]:
        raise ValueError("it lists no file")
    for name, entry in content["files"].items():
        _check_entry(name, entry)
    return content["files"]


def _without_duplicates(pairs: list[tuple]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it holds a name twice")
    return values


def _check_entry(name: str, entry: object) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name == ".":
        raise ValueError(f"it names {name!r}, which lies outside or is no plain name")
    if not name.isprintable():
        raise ValueError(f"it names {name!r}, which holds control characters")
    size, checksum = (entry.get("bytes"), entry.get("xxh3_128")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        raise ValueError(f"it describes {name!r} by something else than a size and a checksum")


def _problem(path: Path, name: str, entry: dict) -> str | None:
    try:
        if not path.is_file():  # a pipe would be read without end
            return f"{name} is not a file" if path.exists() else f"{name} cannot be read (No such file or directory)"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if _read_through(path) != (entry["xxh3_128"], size):
            return f"{name} has changed (its checksum is another)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _read_through(path: Path) -> tuple[str, int]:
    """The checksum of a file and the number of bytes that it is of."""
    digest, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):  # into the same memory each time, which stays in the CPU's cache
            digest.update(buffer[:count])
            size += count
    return digest.hexdigest(), size
