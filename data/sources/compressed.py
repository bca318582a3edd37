"""Opens files for reading, decompressed where their suffix says so; a decompression bomb ends in an OSError."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

_MAX_EXPANSION = 200  # text shrinks to a tenth; to less than this, only a bomb does
_ALWAYS_ALLOWED_BYTES = 2**28
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises


def _open_zstd(path: Path) -> BinaryIO:
    return pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")


COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".jsonl" for "Chats.JSONL.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path) -> BinaryIO:
    """The decompressed bytes of a file, as a binary file.

    Raises:
        OSError: the file cannot be opened; when it is read: it is damaged, or expands more than 200-fold.
    """
    opener = COMPRESSIONS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    limit = max(_ALWAYS_ALLOWED_BYTES, _MAX_EXPANSION * path.stat().st_size)
    return io.BufferedReader(_Limited(opener(path), limit), 2**18)


class _Limited(io.RawIOBase):
    """Reads at most `limit` bytes of a file, and turns what decompressors raise into an OSError."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit, self._read = file, limit, 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer) -> int:
        """See io.RawIOBase."""
        try:
            data = self._file.read(len(buffer))
        except ERRORS as error:
            raise OSError(f"damaged compressed file: {str(error)[:80]}") from error
        self._read += len(data)
        if self._read > self._limit:
            raise OSError(f"expands to more than {self._limit / 2**20:.0f} MiB, {_MAX_EXPANSION} times its size")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the compressed file, too."""
        self._file.close()
        super().close()
