"""Restrict what is read from a folder of another author: safetensors and JSON, and no file outside of it.

Pickles run code when they are loaded. transformers loads optimizer, scheduler and random states with `weights_only`;
torch.distributed.checkpoint loads the `.metadata` of sharded states without, so that file is read here first by an
unpickler that knows nothing but the classes such a file is made of.
"""

from __future__ import annotations

import json
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import UserError

_SAFE_NAMES = ("model.safetensors", "model.safetensors.index.json")
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
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


def check_model_folder(folder: str | Path) -> None:
    """Refuse a local folder whose weights are pickled, or whose index points outside; hub ids pass.

    Raises:
        UserError: the weights are pickled, or the index names a file outside.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for index in folder.glob("*.index.json"):
        check_index(index)
    pickled = sorted(p.name for pattern in _PICKLE_PATTERNS for p in folder.glob(f"pytorch_model{pattern}"))
    if pickled and not any((folder / name).is_file() for name in _SAFE_NAMES):
        raise UserError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is loaded; only "
            'safetensors are read. If you trust its author, convert it once: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}', use_safetensors=False, dtype='auto')"
            ".save_pretrained('NEW_FOLDER')\" and copy the tokenizer's files there"
        )


def check_index(path: Path) -> None:
    """Refuse an index of weight files that names one outside of its folder.

    Raises:
        UserError: it does, or it is damaged.
    """
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it has no weight_map ({error})") from error
    for name in files:
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"{path} names the weight file {name!r}, which does not lie in its folder; do not use it")


def check_checkpoint(folder: str | Path) -> None:
    """Refuse the same in a checkpoint to resume from, and unsafe metadata of its sharded states.

    Raises:
        UserError: it names files outside, or holds a pickle with anything but such metadata in it.
    """
    for index in Path(folder).glob("*.index.json"):
        check_index(index)
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
