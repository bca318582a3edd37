"""Read what a model is from its config.json, of a local folder or a hub id, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from ..errors import UserError
from ..files.json_file import read_object
from ..files.model_folder import ADAPTER_NAME, CONFIG_NAME, adapter_error, check_files, check_model_folder, quantizer_of
from .fit import code_error, first_line
from .folder import is_packed_by, read_config_file

_QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def find_folder(name: str | Path, argument: str = "--model_name_or_path", cache_dir: str | None = None) -> Path:
    """The local folder `name`, or that of a hub id in the cache, in which not all files need be there yet.

    Raises:
        UserError: see `check_model_folder`; or the hub has no such model, or cannot be reached.
    """
    folder = check_model_folder(name, argument)
    if folder is not None:
        return folder
    try:
        adapter = cached_file(str(name), ADAPTER_NAME, cache_dir=cache_dir, **_QUIET)
        config = None if adapter else cached_file(str(name), CONFIG_NAME, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{argument} {str(name)!r} is neither a folder nor a model that can be had from the hub or its cache: "
            f"{first_line(error)}"
        ) from error
    if adapter is not None:
        raise adapter_error(name, argument, read_object(adapter))
    assert config is not None
    folder = Path(config).parent
    check_files(folder)
    return folder


def check_readable(folder: Path, where: object) -> bool:
    """Whether the model in `folder` is packed, so that `load_packed` should read it.

    Raises:
        UserError: it is quantized by a method that is not read, or has no config.json.
    """
    config = read_config_file(folder)
    return is_packed_by(quantizer_of(folder, config), config, where)


def read_config(
    name: str | Path, where: object, trust_remote_code: bool = False, cache_dir: str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    """transformers' configuration of a model; `where` is for messages.

    Raises:
        UserError: it needs code that must not run, or holds what transformers cannot make a configuration of.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, cache_dir=cache_dir, **kwargs)
    except Exception as error:  # its validators raise classes of their own
        if "trust_remote_code" in str(error):
            raise code_error(where) from error
        raise UserError(
            f"{where}: transformers cannot read its {CONFIG_NAME}: {type(error).__name__}: {first_line(error)}"
        ) from error
