"""The one way into a model folder of somebody else: what is not safe or not a model is refused before it is read.

A folder is read for its safetensors, its JSON and the files of its tokenizer. Links are followed inside the folder, and
inside its repository in a hub cache, where every file of a snapshot is a link to a blob. Python code is never run here;
what runs it with `trust_remote_code` is transformers.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import UserError
from .json_file import read_object, shown

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # in the folder of a finished run: the adapters that are merged into its model

_WEIGHT_NAMES = (SINGLE_NAME, INDEX_NAME)
_PICKLES = (
    "pytorch_model*.bin",
    "pytorch_model*.pt",
    "pytorch_model*.pth",
    "pytorch_model*.pkl",
    "pytorch_model*.ckpt",
)
_JSON = (CONFIG_NAME, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", ADAPTER_NAME)
# What some program reads from a model folder.
_READ = ("*.json", "*.safetensors", "*.gguf", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.py", "vocab*")
_READ_FOLDERS = ("additional_chat_templates", "custom_generate")
# Files in which other quantizers leave their settings beside config.json.
HF_QUANT_CONFIG = "hf_quant_config.json"
_FOREIGN = {HF_QUANT_CONFIG: "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
_MAX_HUB_ID = 96


def check_model_folder(name: str | Path, argument: str = "--model_name_or_path") -> Path | None:
    """The local folder called `name`, checked; None where the name can only be a hub id.

    Args:
        name: what the user gave.
        argument: by which argument, for messages.

    Raises:
        UserError: there is no such folder; or it holds an adapter, pickled weights, a damaged JSON file, an index that
            names a file outside, or a link out of the folder, or cannot be read.
    """
    folder = _checked_folder(name, argument, "the folder of a Hugging Face checkpoint")
    if folder is None:
        return None
    if (folder / ADAPTER_NAME).is_file():
        raise adapter_error(name, argument, read_object(folder / ADAPTER_NAME))
    _check_pickles(folder)
    return folder


def check_adapter_folder(name: str | Path, argument: str = "--adapter_name_or_path") -> Path | None:
    """The local folder of an adapter in PEFT's format, checked; None where the name can only be a hub id.

    Raises:
        UserError: as `check_model_folder`; or the folder holds no adapter.
    """
    folder = _checked_folder(name, argument, "the folder of an adapter")
    if folder is not None and not (folder / ADAPTER_NAME).is_file():
        raise UserError(
            f"{argument} {str(name)!r} has no {ADAPTER_NAME}, so it is no adapter in PEFT's format; {listing(folder)}"
        )
    return folder


def _checked_folder(name: str | Path, argument: str, kind: str) -> Path | None:
    folder = Path(name)
    try:
        if not _is_folder(str(name)):
            _check_hub_id(str(name), argument, kind)
            return None
        check_files(folder)
    except PermissionError as error:
        raise UserError(f"{argument} {str(name)!r} cannot be read ({error}); give yourself the permission") from error
    return folder


def check_files(folder: Path) -> None:
    """Refuse links out of a folder, damaged JSON, and an index that names files outside, by the file's name."""
    _check_links(folder)
    for path in (*(folder / file for file in _JSON), *folder.glob("*.index.json")):
        if path.exists():
            content = read_object(path)
            if path.name.endswith(".index.json"):
                weight_files(path, content)


def weight_files(path: Path, index: dict[str, Any] | None = None) -> dict[str, str]:
    """The weight map of the index at `path`: file names, which lie beside it, by tensor name.

    Raises:
        UserError: the index is damaged, or names a file outside of its folder.
    """
    weight_map = (read_object(path) if index is None else index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} is damaged: it has no weight_map; copy or save the checkpoint again")
    for file in dict.fromkeys(map(str, weight_map.values())):
        if file != Path(file).name or file in ("", ".", "..") or not file.isprintable() or "\\" in file:
            raise UserError(f"{path} names the weight file {file!r}, which does not lie in its folder; do not use it")
    if other := next((file for file in weight_map.values() if not isinstance(file, str)), None):
        raise UserError(f"{path} is damaged: its weight_map names {other!r} as a file")
    return weight_map


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether `path` is a regular file of `folder`, and no link out of it (or out of its repository in a hub cache)."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing or to itself
        return False
    return stat.S_ISREG(real.stat().st_mode) and real.is_relative_to(_root_of(folder))


def check_file_name(name: str | Path, argument: str, file: str, file_argument: str) -> Path:
    """The path of a `file` that the user names inside the local folder `name`.

    Raises:
        UserError: it is not there, or lies elsewhere.
    """
    path = Path(name, file)
    if file != Path(file).name or not path.is_file():
        raise UserError(
            f"{file_argument} {file!r} is not in {argument} {str(name)!r}; name a file that lies in that local folder"
        )
    return path


def adapter_error(name: str | Path, argument: str, adapter: dict[str, Any]) -> UserError:
    """What to say of a folder or hub id that has an adapter_config.json."""
    base = adapter.get("base_model_name_or_path")
    whole = Path(name, CONFIG_NAME).is_file()
    ending = f"; if its weights are merged already, remove {ADAPTER_NAME}" if whole else ""
    return UserError(
        f"{argument} {str(name)!r} is an adapter (it has {ADAPTER_NAME}) of the base model {base!r}; main.py takes it "
        f"as --adapter_name_or_path beside --model_name_or_path {base or 'BASE'}; elsewhere merge it first, "
        'with peft installed: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{name}').merge_and_unload().save_pretrained('NEW_FOLDER')\", copy the tokenizer's files "
        f"there and give NEW_FOLDER{ending}"
    )


def quantizer_of(folder: Path | None, config: dict[str, Any]) -> str | None:
    """The method that quantized a model, by its config.json and the files beside it; None for a plain model."""
    settings = config.get("quantization_config")
    settings = config.get("compression_config") if settings is None else settings
    if settings is None:
        found = (method for file, method in _FOREIGN.items() if folder is not None and (folder / file).is_file())
        return next(found, None)
    if not isinstance(settings, dict):
        raise UserError(
            f"{folder}/{CONFIG_NAME} is damaged: its quantization_config is {type(settings).__name__}, no object"
        )
    producer = settings.get("producer")
    named = settings.get("quant_method") or (producer.get("name") if isinstance(producer, dict) else None)
    if named is None and any(key.endswith("load_in_4bit") or key.endswith("load_in_8bit") for key in settings):
        named = "bitsandbytes"
    return str(named or settings.get("quant_algo") or "an unnamed method")


def listing(folder: Path) -> str:
    """What a folder holds, in a few words, for errors about what it lacks."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).is_dir()
    except PermissionError:
        raise
    except OSError:  # a name too long
        return False


def _check_hub_id(name: str, argument: str, kind: str) -> None:
    if len(name) < 256 and Path(name).is_file():
        raise UserError(f"{argument} {name!r} is a file; give {kind}, or a hub id")
    if not _HUB_ID.fullmatch(name) or len(name) > _MAX_HUB_ID or ".." in name or "--" in name:
        neither = "is neither a folder nor a hub id such as HuggingFaceTB/SmolLM2-135M"
        if not name.strip():
            raise UserError(f"{argument} is empty; {shown(name)} {neither}")
        if name.startswith((".", "/", "~")):
            raise UserError(f"{argument} {shown(name)} does not exist, so it {neither}")
        raise UserError(f"{argument} {shown(name)} {neither}")


def _check_links(folder: Path) -> None:
    for path in _files_read(folder):
        if not is_own_file(path, folder):
            what = "is a link out of its folder, or to nothing" if path.is_symlink() else "is not a regular file"
            raise UserError(f"{path} {what}; it is not read. If you trust it, put a copy in its place (cp -L)")


def _files_read(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _READ_FOLDERS:
            if path.is_symlink():
                yield path
            elif path.is_dir():
                yield from path.iterdir()
        elif any(fnmatchcase(path.name, pattern) for pattern in _READ) and (path.is_symlink() or not path.is_dir()):
            yield path


def _root_of(folder: Path) -> Path:
    """Where the files of `folder` may lie: inside it, or for a snapshot of a hub cache inside its repository."""
    real = folder.resolve()
    repository = real.parent.parent
    return repository if real.parent.name == "snapshots" and (repository / "blobs").is_dir() else real


def _check_pickles(folder: Path) -> None:
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled and not any((folder / name).is_file() for name in _WEIGHT_NAMES):
        raise UserError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is loaded; only "
            'safetensors are read. If you trust its author, convert it once: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}', use_safetensors=False, dtype='auto')"
            ".save_pretrained('NEW_FOLDER')\" and copy the tokenizer's files there"
        )
