"""Restrict what is read from a checkpoint to resume from: no index that leaves it, and no pickle that runs code.

transformers loads optimizer, scheduler and random states with `weights_only`;
torch.distributed.checkpoint loads the `.metadata` of sharded states without, so that file is read here first by an
unpickler that knows nothing but the classes such a file is made of.
"""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import UserError
from .model_folder import weight_files

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_CLASSES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
_OTHER_CLASSES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "bool",
}  # fmt: skip


def check_checkpoint(folder: str | Path) -> None:
    """Refuse an index that names files outside of the checkpoint, and unsafe metadata of its sharded states.

    Raises:
        UserError: it names files outside, or holds a pickle with anything but such metadata in it.
    """
    for index in Path(folder).glob("*.index.json"):
        weight_files(index)
    for path in Path(folder).rglob(".metadata"):
        try:
            with path.open("rb") as file:
                _MetadataUnpickler(file).load()
        except Exception as error:
            raise UserError(f"{path} is not the metadata of a sharded checkpoint: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and name in _DTYPES
        is_metadata = module == _METADATA_MODULE and name in _METADATA_CLASSES
        if not (is_dtype or is_metadata or (module, name) in _OTHER_CLASSES):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    """A member of an Enum, which early versions of Python 3.11 pickle as `getattr(class, name)`; no other attribute."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError(f"it asks for the attribute {name} of {owner}")
    return owner[name]
