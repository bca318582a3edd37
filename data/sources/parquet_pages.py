"""What the columns of a Parquet file expand to, read from its footer and page headers, before anything is decompressed.

Both are Thrift structs in the compact protocol (thrift-compact-protocol.md in apache/thrift); numbers of fields are
those of FileMetaData and PageHeader in parquet.thrift (apache/parquet-format). pyarrow's own objects for them end the
process when a file is damaged.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa

_TEXT_TYPES = (6, 7)  # BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_DICTIONARY_PAGE = 2
_MAX_HEADER_BYTES = 2**16  # a header may hold the least and the greatest value of its page
_DAMAGED = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error, RecursionError)


@dataclass
class Page:
    """One page: sizes in bytes, the position of its content, whether it is a dictionary."""

    compressed: int
    uncompressed: int
    begin: int
    is_dictionary: bool


@dataclass
class Chunk:
    """The pages of one column in one row group; of a damaged chunk, those before the damage."""

    column: str
    holds_text: bool
    codec: int
    values: int
    uncompressed: int
    pages: list[Page] = field(default_factory=list)


def read_chunks(file: BinaryIO) -> list[list[Chunk]]:
    """The chunks of each row group; none if the footer is damaged."""
    try:
        size = file.seek(-8, os.SEEK_END) + 8
        (length,) = struct.unpack_from("<I", file.read(4))
        file.seek(size - 8 - length)
        footer = _Compact(file.read(length)).struct()
        return [[_read_chunk(file, column[3]) for column in group[1]] for group in footer[4]]
    except (*_DAMAGED, OSError):
        return []


def _read_chunk(file: BinaryIO, of: dict) -> Chunk:
    chunk = Chunk(b".".join(of[3]).decode(), of[1] in _TEXT_TYPES, of[4], of[5], of[6])
    position = min(of[9], of.get(11) or of[9])
    end = position + of[7]
    while position < end:
        file.seek(position)
        try:
            header = _Compact(file.read(_MAX_HEADER_BYTES))
            fields = header.struct()
            page = Page(fields[3], fields[2], position + header.at, fields[1] == _DICTIONARY_PAGE)
            position = page.begin + page.compressed
        except _DAMAGED:
            break
        if page.compressed < 0:
            break
        chunk.pages.append(page)
    return chunk


def longest_entry(file: BinaryIO, chunk: Chunk) -> int:
    """The length of the longest text in the dictionary of a chunk, 0 without one; its whole length if it is damaged."""
    page = next((page for page in chunk.pages if page.is_dictionary), None)
    if page is None:
        return 0
    file.seek(page.begin)
    data = file.read(page.compressed)
    longest = position = 0
    try:
        if chunk.codec:
            data = pa.Codec(_CODECS[chunk.codec]).decompress(data, page.uncompressed)
        while position < page.uncompressed:
            (length,) = struct.unpack_from("<I", data, position)
            longest, position = max(longest, length), position + 4 + length
    except (*_DAMAGED, OSError, pa.ArrowException, MemoryError):
        return page.uncompressed
    return min(longest, page.uncompressed)


class _Compact:
    """Values of the compact protocol; a struct is a dict by number of field."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self) -> dict:
        """The struct that begins here."""
        fields: dict = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 0x0F
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)  # a boolean is in its type
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, length: int) -> bytes:
        self.at += length
        return self._data[self.at - length : self.at]

    def _list(self) -> list:
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        return [self._value(head & 0x0F) for _ in range(length)]

    def _value(self, kind: int) -> object:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            return self._list()
        if kind == 12:
            return self.struct()
        raise ValueError(f"type {kind}")
