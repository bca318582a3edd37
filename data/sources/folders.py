"""Which files of a folder are data, and of which split; the others are passed over, with a reason."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from qat.errors import UserError

from .card import Configuration, read_configurations
from .compressed import kind_of
from .files import READERS, TEXT_KIND
from .splits import assign_splits, canonical

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_PROSE = re.compile(r"(read[-_ ]?me|licen[cs]e|notice|copying|change[-_ ]?log|citation|authors|requirements)([^a-z]|$)")
_SHOWN = 8


@dataclass
class Folder:
    """The data files of a folder by split, and the names of the others by the reason why they are passed over."""

    splits: dict[str, list[Path]] = field(default_factory=dict)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, name: str, reason: str) -> None:
        """Note a file that is not read."""
        self.passed_over.setdefault(reason, []).append(name)

    def report(self) -> str:
        """One line about the files that were passed over; empty if there are none."""
        return "; ".join(f"{shown(names)} ({reason})" for reason, names in self.passed_over.items())


def shown(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def read_folder(
    root: Path,
    requested: tuple[str, ...],
    argument: str,
    files: list[Path] | None = None,
    configuration: str | None = None,
) -> Folder:
    """Assign the files below `root`, or those of `files`, to splits.

    Args:
        requested: names of splits beside those that `datasets` knows.
        argument: the command-line argument that names the folder.
        configuration: the name of one that the folder's README.md declares.

    Raises:
        UserError: a folder cannot be listed, `datasets.save_to_disk` names a file that is not there, or the README.md
            does not say which configuration is meant.
    """
    folder = Folder()
    try:
        found = [file.relative_to(root) for file in (_walk(root) if files is None else files)]
        saved = _saved_datasets(root, found)
    except OSError as error:
        raise UserError(f"--{argument} {root}: {error.filename}: {error.strerror}") from error
    data = []
    for file in found:
        is_special = (root / file).exists() and not (root / file).is_file()
        reason = "not a regular file" if is_special else _not_data(file, saved)
        data.append(file) if reason is None else folder.pass_over(str(file), reason)
    is_text_only = all(kind_of(file) == TEXT_KIND for file in data)
    for file in data:
        if kind_of(file) == TEXT_KIND and not is_text_only:
            folder.pass_over(str(file), "text beside structured files")
    data = [file for file in data if is_text_only or kind_of(file) != TEXT_KIND]
    declared = _chosen(root, configuration, argument) if files is None else None
    if declared is not None:
        data = _place_declared(folder, root, data, declared, requested)
        if not data and folder.splits:
            return folder
    _place(folder, root, data, saved, requested)
    return folder


def _chosen(root: Path, name: str | None, argument: str) -> Configuration | None:
    declared = {configuration.name: configuration for configuration in read_configurations(root)}
    if name is None and len(declared) > 1:
        name = next((c.name for c in declared.values() if c.is_default), None)
    elif name is None:
        return next(iter(declared.values()), None)
    if name not in declared:
        names = ", ".join(declared) or "no configuration"
        choice = f"; choose one: {root}@{next(iter(declared))}" if declared else ""
        raise UserError(f"--{argument} {root}: its README.md declares {names}{choice}")
    return declared[name]


def _place_declared(
    folder: Folder, root: Path, data: list[PurePath], declared: Configuration, requested: tuple[str, ...]
) -> list[PurePath]:
    """Assign files as a configuration says; returns those that are left to be assigned by their names."""
    splits = declared.splits(data)
    is_inside = [declared.folder and file.is_relative_to(declared.folder.strip("./")) for file in data]
    left = []
    for file, inside in zip(data, is_inside, strict=True):
        if file in splits:
            folder.splits.setdefault(canonical(splits[file], requested), []).append(root / file)
        elif not splits and (inside or not any(is_inside)):
            left.append(file)
        else:
            folder.pass_over(str(file), f"not in the configuration {declared.name} of README.md")
    return left


def _place(folder: Folder, root: Path, data: list[PurePath], saved: dict, requested: tuple[str, ...]) -> None:
    """Assign files by the words in their names; the folders of a saved DatasetDict are its splits."""
    is_dict = (root / "dataset_dict.json").is_file()
    splits = assign_splits([file for file in data if not (is_dict and file.parent in saved)], requested)
    seen: set[tuple[str, str]] = set()
    for file in data:
        split = splits[file] if file in splits else canonical(file.parts[0], requested)
        identity = (split or "", os.path.realpath(root / file))
        if split is None:
            folder.pass_over(str(file), "names no split, while others name train; to train on it, give it, too")
        elif identity in seen:
            folder.pass_over(str(file), "a link to a file that is read already")
        else:
            seen.add(identity)
            folder.splits.setdefault(split, []).append(root / file)


def _walk(root: Path) -> list[Path]:
    """All files below `root` but hidden ones, through links to folders, each folder once."""

    def refuse(error: OSError) -> None:
        raise error

    files, seen = [], set()
    for here, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _not_data(file: PurePath, saved: dict[PurePath, list[str]]) -> str | None:
    kind, name = kind_of(file), file.name.lower()
    if name in _METADATA or (kind not in READERS or kind == TEXT_KIND) and _PROSE.match(name):
        return "not data"
    if kind not in READERS:
        return "of no known kind"
    if file.parent in saved and file.name not in saved[file.parent]:
        return "not named by state.json"
    return None


def _saved_datasets(root: Path, found: list[PurePath]) -> dict[PurePath, list[str]]:
    """Folders that `datasets.save_to_disk` wrote, and the names of their data files."""
    saved = {}
    for file in found:
        if file.name != "state.json":
            continue
        try:
            state = json.loads((root / file).read_text(encoding="utf-8"))
            names = [entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            continue  # another program's state
        missing = [name for name in names if PurePath(name).name != name or not (root / file.parent / name).is_file()]
        if missing:
            raise FileNotFoundError(0, f"{file} names it, and it is not there; save the dataset again", missing[0])
        saved[file.parent] = names
    return saved
