"""What the compressed buffers of an Arrow file expand to, read before anything is decompressed.

Messages are flatbuffers, whose fields have the numbers of Message.fbs in apache/arrow. A compressed buffer begins with
its uncompressed length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa

_HEADER, _DICTIONARY_DATA, _BUFFERS, _COMPRESSION = 2, 1, 2, 3  # fields of Message, DictionaryBatch, RecordBatch


def expansions(source: pa.NativeFile) -> Iterator[tuple[int, int]]:
    """(compressed bytes, uncompressed bytes) of each compressed buffer from here to the end of the stream."""
    for message in pa.MessageReader.open_stream(source):
        if message.type not in ("record batch", "dictionary"):
            continue
        data = memoryview(message.metadata)
        batch = _table(data, _root(data), _HEADER)
        if message.type == "dictionary" and batch is not None:
            batch = _table(data, batch, _DICTIONARY_DATA)
        if batch is None or _field(data, batch, _COMPRESSION) is None or (at := _field(data, batch, _BUFFERS)) is None:
            continue
        vector = at + _unsigned(data, at)
        for number in range(_unsigned(data, vector)):
            offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * number)
            if length >= 8:
                yield length, struct.unpack_from("<q", message.body, offset)[0]


def _unsigned(data: memoryview, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def _root(data: memoryview) -> int:
    return _unsigned(data, 0)


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a table stands, None if it is left out."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, layout)[0]:
        return None
    offset = struct.unpack_from("<H", data, layout + 4 + 2 * number)[0]
    return table + offset if offset else None


def _table(data: memoryview, table: int, number: int) -> int | None:
    at = _field(data, table, number)
    return None if at is None else at + _unsigned(data, at)
