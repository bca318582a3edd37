"""Which kernels vLLM selected for quantized layers, read from its log.

vLLM decides by hardware and installed packages, in a process of its own, and says so only in its log. Its processes
read VLLM_LOGGING_CONFIG_PATH, so a configuration there lets them write into a file, beside the standard output.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
NOT_FOUND = "not found in vLLM's log"
# vLLM 0.32: "Using CPUWNA16LinearKernel for mixed-precision linear", "Selected CutlassFP8ScaledMMLinearKernel for
# CompressedTensorsW8A8Fp8", and for experts "Using MarlinExperts for MXFP4 MoE".
_SELECTED = re.compile(r"\b(?:Using|Selected) (\w+(?:Kernel|Experts\w*)) for ")


def kernels_in(log: str) -> str:
    """The kernels that a log names, in the order of their first lines, or NOT_FOUND."""
    return ", ".join(dict.fromkeys(_SELECTED.findall(log))) or NOT_FOUND


class VllmLog:
    """The log of all vLLM processes that this one starts, as a file.

    To be made before vLLM is imported. Where the environment configures vLLM's log already, that stays, and nothing is
    read.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._read = 0
        own = next((name for name in (CONFIG_VARIABLE, "VLLM_CONFIGURE_LOGGING") if os.environ.get(name)), None)
        if own is not None:
            logger.warning("%s=%s configures vLLM's log, so kernels are not read from it", own, os.environ[own])
            return
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-log-", ignore_cleanup_errors=True)  # until the end
        folder = Path(self._folder.name)
        self._path = folder / "vllm.log"
        self._path.touch()
        config = folder / "logging.json"
        config.write_text(json.dumps(_configuration(self._path)), encoding="utf-8")
        os.environ[CONFIG_VARIABLE] = str(config)

    def new_lines(self) -> str:
        """What was written since the last call; "" where the log is not read."""
        if self._path is None:
            return ""
        with self._path.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._read)
            text = file.read()
            self._read = file.tell()
        return text


def _configuration(path: Path) -> dict:
    """For `logging.config.dictConfig`: the level that the user chose on standard output, INFO in the file."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    console = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "line", "level": level}
    file = {"class": "logging.FileHandler", "filename": str(path), "formatter": "line", "level": "INFO"}
    lowest = min(level, "INFO", key=lambda name: logging.getLevelNamesMapping().get(name, logging.INFO))
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s"}},
        "handlers": {"console": console, "file": file},
        "loggers": {"vllm": {"handlers": ["console", "file"], "level": lowest, "propagate": False}},
    }
