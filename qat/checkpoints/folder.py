"""CheckpointFolder: the safetensors files of a Hugging Face checkpoint, checked before anyone relies on them.

Opening a folder reads headers only. A file whose length differs from what its header promises, a shard that the index
names and the folder lacks, and a tensor that its shard lacks are found here, not in the middle of a long job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointFolder:
    """A checked folder.

    Attributes:
        path: the folder.
        config: the content of its `config.json`.
        shards: tensor names by file name, files in the order of their names.
    """

    path: Path
    config: dict
    shards: dict[str, tuple[str, ...]]

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointFolder:
        """Read the headers of `folder`.

        Raises:
            UserError: it is not a checkpoint in safetensors files, or one that is damaged or incomplete.
        """
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"{str(folder)!r} is not a folder; name the folder of a Hugging Face checkpoint")
        config = _read_json(path / CONFIG_NAME, f"{path} is not a Hugging Face checkpoint: it has no {CONFIG_NAME}")
        if (path / INDEX_NAME).is_file():
            index = _read_json(path / INDEX_NAME, "")
            if not isinstance(index.get("weight_map"), dict):
                raise UserError(f"{path / INDEX_NAME} has no weight_map; copy or save the checkpoint again")
            promised: dict[str, set[str]] = {}
            for name, file in index["weight_map"].items():
                promised.setdefault(file, set()).add(name)
        elif (path / SINGLE_NAME).is_file():
            promised = {SINGLE_NAME: set()}
        else:
            raise UserError(
                f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}; weights in other files (.bin, .gguf) must be "
                "loaded and saved with transformers first"
            )
        return cls(path, config, {file: _names_in(path / file, names) for file, names in sorted(promised.items())})

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return {name for names in self.shards.values() for name in names}

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.path / file).stat().st_size for file in self.shards)

    @property
    def quantization_config(self) -> dict | None:
        """The quantization settings in config.json; None for a plain checkpoint."""
        return self.config.get("quantization_config")

    def tensors(self, file: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of one shard, memory-mapped: what is not kept costs no memory."""
        with safe_open(self.path / file, framework="pt") as shard:
            for name in self.shards[file]:
                yield name, shard.get_tensor(name)

    def read(self, *names: str) -> list[torch.Tensor]:
        """Single tensors by name."""
        result = []
        for name in names:
            file = next(file for file, held in self.shards.items() if name in held)
            with safe_open(self.path / file, framework="pt") as shard:
                result.append(shard.get_tensor(name))
        return result


def _read_json(path: Path, missing: str) -> dict:
    if not path.is_file():
        raise UserError(missing)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def _names_in(path: Path, promised: set[str]) -> tuple[str, ...]:
    """Names in the shard at `path`, which must have those that the index promised."""
    if not path.is_file():
        raise UserError(f"{path} is missing, though {INDEX_NAME} names it; copy the checkpoint again")
    try:
        with safe_open(path, framework="pt") as shard:
            names = tuple(shard.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); copy or save the checkpoint again") from error
    if lacking := sorted(promised - set(names)):
        raise UserError(f"{path} lacks {len(lacking)} tensors that {INDEX_NAME} promises, e.g. {lacking[0]}")
    return names
