"""Companions: the files beside weights and config.json that a served model needs, copied into another folder."""

from __future__ import annotations

import logging
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from ..files.model_folder import is_own_file

logger = logging.getLogger(__name__)

OF_TEXT = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "LICENSE*",
)  # fmt: skip
OF_IMAGES = ("*processor_config.json",)
CODE = ("*.py",)


def copy_companions(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `source` whose names match one of `patterns`.

    Regular files of the source alone: what a link out of it points to is somebody else's, which is logged.
    """
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors" or not any(fnmatchcase(path.name, pattern) for pattern in patterns):
            continue
        if is_own_file(path, source):
            shutil.copyfile(path, folder / path.name)
        elif not path.is_dir():
            logger.warning("%s is not copied: it is a link out of its folder, or no regular file", path)
