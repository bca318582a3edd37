"""The configurations that the README.md of a dataset declares, as the hub reads them.

See https://huggingface.co/docs/hub/datasets-manual-configuration: the metadata on top of the file name the files of
each split of each configuration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import yaml

_MAX_BYTES = 2**20


@dataclass
class Configuration:
    """One configuration: patterns of files by split; without any, the folder in which files are looked for."""

    name: str
    patterns: dict[str, list[str]] = field(default_factory=dict)
    folder: str = ""
    is_default: bool = False

    def splits(self, files: Iterable[PurePath]) -> dict[PurePath, str]:
        """The split of each of `files` that a pattern matches; a file belongs to the first."""
        found: dict[PurePath, str] = {}
        for split, patterns in self.patterns.items():
            for file in files:
                if any(_matches(file, pattern) for pattern in patterns):
                    found.setdefault(file, split)
        return found


def read_configurations(root: Path) -> list[Configuration]:
    """The configurations of the dataset in `root`; none without a README.md that declares some."""
    try:
        with (root / "README.md").open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
        metadata = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---\n") else None
        return [_configuration(entry) for entry in metadata["configs"]]
    except (OSError, ValueError, yaml.YAMLError, RecursionError, TypeError, KeyError, AttributeError):
        return []  # no card, or one that the hub would not understand either


def _configuration(entry: dict) -> Configuration:
    files, patterns = entry.get("data_files") or [], {}
    for item in files if isinstance(files, list) else [files]:
        split, path = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    name = str(entry["config_name"])
    return Configuration(
        name, patterns, str(entry.get("data_dir") or ""), bool(entry.get("default", name == "default"))
    )


def _matches(file: PurePath, pattern: str) -> bool:
    """`*` matches within one folder, `**` through all."""
    return _match_parts(file.parts, tuple(part for part in pattern.split("/") if part not in ("", ".")))


def _match_parts(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_match_parts(parts[i:], pattern[1:] or ("*",)) for i in range(len(parts)))
    return bool(parts) and PurePath(parts[0]).match(pattern[0]) and _match_parts(parts[1:], pattern[1:])
