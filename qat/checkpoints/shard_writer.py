"""ShardWriter: a safetensors file whose tensors are written as they come, in any order, by several threads.

`safetensors.save_file` needs all tensors of a file at once. Here their shapes and dtypes are known before, so the
header comes first and each tensor goes to its place. The file is flushed to disk while later tensors are made: when
some hundred MiB have come, and when the last one has.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from .staging import pieces

_METADATA = {"format": "pt"}
_ALIGNMENT = 8
_FLUSH_BYTES = 1 << 28
_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB a call


class ShardWriter:
    """A safetensors file that is being written.

    Args:
        path: the file; one that is there is replaced.
        expected: tensors of the dtypes and shapes that are going to be put, by name; only these two are read.
    """

    def __init__(self, path: Path, expected: Mapping[str, torch.Tensor]) -> None:
        # The largest elements first, so that each tensor is aligned to its own; then by name, as safetensors does.
        names = sorted(expected, key=lambda name: (-expected[name].element_size(), name))
        header: dict[str, dict] = {"__metadata__": dict(_METADATA)}
        self.places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        end = 0
        for name in names:
            tensor, begin = expected[name], end
            end += tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _name_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
            self.places[name] = begin, tensor.dtype, tensor.shape
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.begin, self.nbytes = 8 + len(text), end
        self._lock, self._left, self._unflushed = threading.Lock(), len(names), 0
        self._flushing = threading.Lock()
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._write(memoryview(len(text).to_bytes(8, "little") + text), 0)
        if not names:
            self._flush(closes=True)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor; the last one flushes and closes the file."""
        begin, dtype, shape = self.places.pop(name)
        assert (tensor.dtype, tensor.shape) == (dtype, shape), (name, tensor.dtype, tensor.shape, dtype, shape)
        offset = self.begin + begin
        for values in pieces(tensor):
            self._write(values, offset)
            offset += len(values)
        with self._lock:
            self._left -= 1
            self._unflushed += tensor.nbytes
            is_last, is_due = self._left == 0, self._unflushed >= _FLUSH_BYTES
            if is_due:
                self._unflushed = 0
        if is_last or is_due:
            self._flush(closes=is_last)

    def abandon(self) -> None:
        """Close the file as it is, after an error; nobody may be writing any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _flush(self, closes: bool) -> None:
        with self._flushing:
            if self._descriptor is not None:  # else the last one has flushed all
                os.fsync(self._descriptor)
            if closes:
                self.abandon()

    def _write(self, values: memoryview, offset: int) -> None:
        assert self._descriptor is not None
        while values:
            written = os.pwrite(self._descriptor, values[:_WRITE_BYTES], offset)
            values, offset = values[written:], offset + written


@cache
def _name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    content = save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["x"]["dtype"]
