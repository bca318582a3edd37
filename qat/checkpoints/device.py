"""Where an export and its proof compute: a GPU that has the memory, else the CPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import UserError
from .fit import first_line
from .folder import CheckpointFolder
from .matrices import Matrix
from .pipeline import CPU, threads_for
from .staging import free_pinned

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_CONTEXT_BYTES = 1 << 30  # of kernels and libraries in a process that begins to use a GPU
# For a value of a matrix: itself in FP32 and BF16, its codes, and what a library makes of these to decompress them.
_BYTES_PER_VALUE = 24
_BYTES_COMPARED = 9  # for a value of a tensor that is not packed: twice in FP32, and whether they differ


def choose_device(wanted: str | None, needed_bytes: int, what: str) -> torch.device:
    """The device called `wanted`; by default a GPU with `needed_bytes` of free memory, else the CPU.

    Args:
        what: is going to be computed there, for the log.

    Raises:
        UserError: there is no such device.
    """
    if wanted is not None:
        return named_device(wanted)
    if not torch.cuda.is_available():
        return CPU
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        free = free_bytes(device)
    except RuntimeError as error:  # others fill it, or have it for themselves
        logger.warning("%s is on the CPU, since %s cannot be used: %s", what, device, first_line(error))
        return CPU
    if free >= needed_bytes:
        return device
    logger.info(
        "%s needs %.1f GiB on a GPU and %.1f are free, so it is on the CPU", what, needed_bytes / 2**30, free / 2**30
    )
    return CPU


def compute_on(device: torch.device, wanted: str | None, what: str, work: Callable[[torch.device], Result]) -> Result:
    """What `work(device)` gives; `work(CPU)` where others have taken the memory of a GPU that nobody asked for.

    Args:
        device: as `choose_device` gave it for `wanted` and `what`.
        work: begins anew in each call.

    Raises:
        UserError: the GPU that is `wanted` has too little memory.
    """
    try:
        return _given_back(work(device), device)
    except RuntimeError as error:  # that of CUDA itself, and of Triton, is no torch.OutOfMemoryError
        if "out of memory" not in str(error):
            raise
        if wanted is not None:
            raise UserError(f"--device {wanted!r} has too little free memory for {what}; give --device cpu") from error
        logger.warning("%s ran out of memory on %s, so it begins anew on the CPU", what, in_words(device))
    return work(CPU)


def _given_back(result: Result, device: torch.device) -> Result:
    """`result`, once the pinned memory of what computed it is the system's again."""
    if device.type == "cuda":
        free_pinned(device)
    return result


def named_device(name: str) -> torch.device:
    """The device called `name`: "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: there is no such device.
    """
    count = torch.cuda.device_count()
    choices = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in choices:
        raise UserError(f"--device {name!r} is no device of this machine; choose one of {', '.join(choices)}")
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, once this process has let go of what it caches."""
    gc.collect()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def most_bytes(checkpoint: CheckpointFolder, matrices: Mapping[str, list[Matrix]]) -> int:
    """Bytes of GPU memory that packing or comparing takes at most: for one large matrix in each thread."""
    largest = max((_values(checkpoint, stored, held) for stored, held in matrices.items()), default=0)
    whole = max((torch.Size(stored.shape).numel() for stored in checkpoint.stored.values()), default=0)
    return _CONTEXT_BYTES + threads_for(torch.device("cuda")) * largest * _BYTES_PER_VALUE + whole * _BYTES_COMPARED


def in_words(device: torch.device) -> str:
    """A device for people: "the CPU" or "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return "the CPU" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _values(checkpoint: CheckpointFolder, stored: str, held: list[Matrix]) -> int:
    """Values of the largest matrix in a stored tensor, and a part of the tensor's for itself."""
    values = torch.Size(checkpoint.stored[stored].shape).numel()
    return values // len(held) + values // 8


def free_host_bytes() -> int:
    """Bytes of memory that this machine can still give, within the limit of a container; 0 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    limit, used, counts = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current", "stat"))
    if all(path.is_file() for path in (limit, used, counts)) and (most := limit.read_text().strip()) != "max":
        cached = dict(line.split() for line in counts.read_text().splitlines()).get("inactive_file", 0)
        free = min(free, int(most) - int(used.read_text()) + int(cached))
    return free
