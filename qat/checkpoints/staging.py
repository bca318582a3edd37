"""Copies between files and a GPU through one pinned buffer for each thread.

Memory that the system has to find for every copy costs many times the copy itself: on one machine fresh pageable
memory took ten times as long as memory in use, and forty times as long as pinned memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch

_BYTES = 1 << 25
_OWN = threading.local()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A memory-mapped tensor on `device`; the copy is there when this returns."""
    if device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    for values, place in zip(_bytes_of(tensor).split(_BYTES), _bytes_of(copy).split(_BYTES), strict=True):
        held = _buffer()[: values.numel()].copy_(values)
        place.copy_(held, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()  # the buffer is free again
    return copy


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order; each piece is valid until the next is asked for."""
    if tensor.device.type == "cpu":
        yield _bytes_of(tensor).numpy().data
        return
    for values in _bytes_of(tensor).split(_BYTES):
        held = _buffer()[: values.numel()].copy_(values, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        yield held.numpy().data


def free_pinned(device: torch.device) -> None:
    """Give pinned memory that nothing uses any more back to the system; PyTorch would keep it for later tensors.

    Args:
        device: a GPU that this process uses; the call would begin to use another one.
    """
    with torch.cuda.device(device):
        torch._C._host_emptyCache()


def pinned_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Pinned memory that copies of these GPU tensors take, one after the other.

    PyTorch rounds a block to a power of two, uses it again for tensors of that size only, and `torch.save` holds the
    block before while it asks for the next one.
    """
    return 2 * sum({1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if tensor.is_cuda and tensor.nbytes})


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _buffer() -> torch.Tensor:
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return _OWN.buffer
