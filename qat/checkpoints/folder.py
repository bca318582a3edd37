"""CheckpointFolder: the safetensors files of a Hugging Face checkpoint, checked before anyone relies on them.

Opening a folder reads headers only. A file whose length differs from what its header promises, a shard that the index
names and the folder lacks, and a tensor that its shard lacks are found here, not in the middle of a long job.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files.json_file import read_object
from ..files.model_folder import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    check_model_folder,
    listing,
    quantizer_of,
    weight_files,
)
from .dialects import DIALECTS
from .dialects.mxfp4 import FORMAT as NATIVE
from .dialects.mxfp4 import MODEL_TYPE

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_NAME", "CheckpointFolder", "Stored"]

# Programs whose packed folders are read: those whose formats are written, and Model-Optimizer.
MODEL_OPTIMIZER = "modelopt"
Reader = Callable[[str], torch.Tensor]  # tensors by their names
READ_METHODS = (*(dialect.quant_method for dialect in DIALECTS.values()), MODEL_OPTIMIZER)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_SIZES = ("_dim", "_size")
_SMALL_SIZE = 10**6
_FEW_LAYERS = 1000  # are built in seconds
_SHARD_OF_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Stored:
    """What the header of a file says of a tensor.

    Attributes:
        dtype: as safetensors writes it, such as "BF16".
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFolder:
    """A checked folder.

    Attributes:
        path: the folder.
        config: the content of its `config.json`.
        shards: what the headers say by tensor name, by file name; files in the order of their names.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, Stored]]

    @classmethod
    def open(cls, folder: str | Path, argument: str = "the checkpoint folder") -> CheckpointFolder:
        """Read the headers of `folder`.

        Args:
            argument: by which argument the user named it, for messages.

        Raises:
            UserError: see `check_model_folder`; or it is not a checkpoint in safetensors files, or one that is damaged
                or incomplete.
        """
        path = check_model_folder(folder, argument)
        if path is None:
            raise UserError(
                f"{argument} {str(folder)!r} is not a folder; name the folder of a Hugging Face checkpoint (download "
                "a hub model first)"
            )
        config = read_config_file(path)
        shards = {file: _tensors_in(path / file, names) for file, names in sorted(_promised(path).items())}
        _check_unique(path, shards)
        _check_sizes(path, config, [tensor for tensors in shards.values() for tensor in tensors.values()])
        return cls(path, config, shards)

    @property
    def stored(self) -> dict[str, Stored]:
        """What the headers say, by tensor name."""
        return {name: tensor for tensors in self.shards.values() for name, tensor in tensors.items()}

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return {name for names in self.shards.values() for name in names}

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.path / file).stat().st_size for file in self.shards)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The quantization settings in config.json; None for a plain checkpoint."""
        return self.config.get("quantization_config")

    @property
    def quantizer(self) -> str | None:
        """The method that quantized it; None for a plain checkpoint."""
        return quantizer_of(self.path, self.config)

    @property
    def is_packed(self) -> bool:
        """Whether it is quantized by one of READ_METHODS, so that `load_packed` should read it.

        Raises:
            UserError: it is quantized by another method.
        """
        return is_packed_by(self.quantizer, self.config, self.path)

    def tensors(self, file: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of one shard, memory-mapped: what is not kept costs no memory."""
        with safe_open(self.path / file, framework="pt") as shard:
            for name in self.shards[file]:
                yield name, shard.get_tensor(name)

    def read(self, *names: str) -> list[torch.Tensor]:
        """Single tensors by name."""
        with self.reading() as read:
            return [read(name) for name in names]

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """What reads single tensors by name; each file is opened once, which counts where there are thousands."""
        files = {name: file for file, names in self.shards.items() for name in names}
        shards: dict[str, Any] = {}
        with ExitStack() as stack:

            def read(name: str) -> torch.Tensor:
                file = files[name]
                if file not in shards:
                    shards[file] = stack.enter_context(safe_open(self.path / file, framework="pt"))
                return shards[file].get_tensor(name)

            yield read


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of the config.json of `folder`.

    Raises:
        UserError: there is none, or it is damaged, or names weights in another file.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{folder} is not a Hugging Face checkpoint: it has no {CONFIG_NAME}; {listing(folder)}")
    config = read_object(path)
    if other := config.get("transformers_weights"):
        raise UserError(f"{path} has its weights in {other!r}; only {SINGLE_NAME} and {INDEX_NAME} are read")
    return config


def is_packed_by(method: str | None, config: Mapping[str, Any], where: object) -> bool:
    """Whether weights quantized by `method` are read by this program; False for a plain model.

    Args:
        config: the content of the model's config.json.

    Raises:
        UserError: the method is another one.
    """
    is_foreign = method == NATIVE and config.get("model_type") != MODEL_TYPE  # the tensors are those of gpt-oss
    if method is not None and (method not in READ_METHODS or is_foreign):
        raise UserError(
            f"{where} is quantized by {method}, which is not read; give the BF16 checkpoint that it was made of, or a "
            "local folder packed in MXFP4, MXFP8, NVFP4, INT4 or FP8 by llm-compressor, AutoRound or Model-Optimizer"
        )
    return method is not None


def _promised(path: Path) -> dict[str, set[str]]:
    """The weight files of a folder, and the names that an index promises in each."""
    if odd := next((p.name for p in path.iterdir() if _SHARD_OF_RANKS.fullmatch(p.name)), None):
        raise UserError(f"{path} has the weights of single processes ({odd}); load and save it with transformers first")
    has_single, has_index = (path / SINGLE_NAME).is_file(), (path / INDEX_NAME).is_file()
    promised: dict[str, set[str]] = {}
    for name, file in weight_files(path / INDEX_NAME).items() if has_index else ():
        if not file.endswith(".safetensors"):
            raise UserError(f"{path / INDEX_NAME} names the weight file {file!r}, which is no .safetensors file")
        promised.setdefault(file, set()).add(name)
    if has_single and set(promised) - {SINGLE_NAME}:
        raise UserError(
            f"{path} has both {SINGLE_NAME} and {INDEX_NAME}, which names other files: one of them is left from "
            "another save; remove it"
        )
    if not has_single and not has_index:
        raise UserError(
            f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}; {listing(path)}; weights in other files (.bin, .gguf) "
            "must be loaded and saved with transformers first"
        )
    return promised or {SINGLE_NAME: set()}


def _tensors_in(path: Path, promised: set[str]) -> dict[str, Stored]:
    """What the header of the shard at `path` says; it must have the names that the index promised."""
    if not path.is_file():
        raise UserError(f"{path} is missing, though {INDEX_NAME} names it; copy the checkpoint again")
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - it is no dict
            found = {name: Stored(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); copy or save the checkpoint again") from error
    if lacking := sorted(promised - set(found)):
        raise UserError(f"{path} lacks {len(lacking)} tensors that {INDEX_NAME} promises, e.g. {lacking[0]}")
    return found


def _check_unique(path: Path, shards: dict[str, dict[str, Stored]]) -> None:
    seen: dict[str, str] = {}
    for file, tensors in shards.items():
        for name in tensors:
            if name in seen:
                raise UserError(f"{path} has the tensor {name} twice, in {seen[name]} and {file}; save it again")
            seen[name] = file


def _check_sizes(path: Path, config: dict[str, Any], stored: list[Stored]) -> None:
    """Refuse a config.json that promises more layers or larger ones than the weights are, before they are built."""
    values = sum(math.prod(tensor.shape) for tensor in stored)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if not isinstance(value, int):
                continue
            too_many = key in _LAYER_COUNTS and value > max(len(stored), _FEW_LAYERS)
            too_large = key.endswith(_SIZES) and value > max(values, _SMALL_SIZE)
            if too_many or too_large:
                raise UserError(
                    f"{path / CONFIG_NAME} has {key} {value}, but the weights are {len(stored)} tensors of "
                    f"{values} values in all; copy or save the checkpoint again"
                )
