"""Rows of Parquet and Arrow files; a row may have as many bytes as a line may have, whatever the file expands to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..bad_samples import BadSample
from .arrow_buffers import expansions
from .arrow_sizes import may_repeat, row_bytes
from .parquet_pages import Chunk, longest_entry, read_chunks
from .row import MAX_LINE_BYTES, Row, overlong

BATCH_ROWS = 64
_BATCH_BYTES = 2**25  # of rows that are Python objects at the same time
_MAX_PAGE_BYTES, _MAX_EXPANSION = 2**26, 100  # a page that is larger and expands more is a decompression bomb
_ALWAYS_ALLOWED_BYTES, _MAX_FILE_EXPANSION = 2**30, 1000
_MAX_GROUP_BYTES, _MAX_REPETITION = 2**28, 64  # what texts may expand to when each reference is a copy
_ERRORS = (
    pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, TypeError, IndexError, KeyError, struct.error,
)  # fmt: skip


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, by row groups."""
    yield from _numbered(path, "Parquet", _parquet_batches(path))


def read_arrow(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file: the stream format, which `datasets` writes, or the file format."""
    yield from _numbered(path, "Arrow", _arrow_batches(path))


def _numbered(path: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = decoded = 0
    try:
        limit = max(_ALWAYS_ALLOWED_BYTES, _MAX_FILE_EXPANSION * path.stat().st_size)
        for batch in batches:
            decoded += batch.nbytes
            if decoded > limit:
                raise ValueError(f"it expands to more than {limit / 2**20:.0f} MiB; the rest is not read")
            for row in _rows(batch):
                place = f"{path}[{number}]"
                yield place, overlong(row, place) if isinstance(row, int) else row
                number += 1
    except _ERRORS as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        yield str(path), BadSample(f"unreadable {kind}", f"after {number} rows: {detail[:160]}", str(path))
        return
    if not number:
        yield str(path), BadSample("empty file", "a table without rows", str(path))


def _rows(batch: pa.RecordBatch) -> Iterator[dict | int]:
    """The rows of a batch as objects; of a row that is too large, its number of bytes."""
    if batch.nbytes <= MAX_LINE_BYTES and not any(may_repeat(kind) for kind in batch.schema.types):
        yield from batch.to_pylist()
        return
    sizes = row_bytes(batch)
    if sizes.sum() <= _BATCH_BYTES and sizes.max(initial=0) <= MAX_LINE_BYTES:
        yield from batch.to_pylist()
        return
    for number, size in enumerate(sizes.tolist()):
        yield size if size > MAX_LINE_BYTES else batch.slice(number, 1).to_pylist()[0]


# ---- Parquet ----


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as raw, pq.ParquetFile(path) as file:
        _check_names(file.schema_arrow)
        chunks = read_chunks(raw)
        for group in range(file.num_row_groups):
            rows, texts = _plan(raw, chunks[group]) if group < len(chunks) else (1, [])
            if not texts:
                yield from file.iter_batches(rows, [group])
                continue
            with pq.ParquetFile(path, read_dictionary=texts) as encoded:
                yield from encoded.iter_batches(rows, [group])


def _plan(raw: BinaryIO, chunks: list[Chunk]) -> tuple[int, list[str]]:
    """How many rows of a row group to decode at once, and the columns of texts that have to stay references.

    Raises:
        ValueError: a page is a decompression bomb.
    """
    largest, references = 1, []
    for chunk in chunks:
        for page in chunk.pages:
            if page.uncompressed > max(_MAX_PAGE_BYTES, _MAX_EXPANSION * page.compressed):
                size = f"{page.uncompressed / 2**20:.0f} MiB in a page of {page.compressed} bytes"
                raise ValueError(f"column {chunk.column[:60]}: {size}")
            largest = max(largest, page.uncompressed)
        if chunk.holds_text:
            copied = chunk.values * longest_entry(raw, chunk)
            if copied > max(_MAX_GROUP_BYTES, _MAX_REPETITION * chunk.uncompressed):
                references.append(chunk.column)
    return max(1, min(BATCH_ROWS, _MAX_PAGE_BYTES // largest)), references


def _check_names(schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise ValueError(f"two columns are named {name[:60]!r}")


# ---- Arrow ----


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(8 if is_file else 0)  # after its magic number, the file format is the stream format
        for compressed, uncompressed in expansions(source):
            if uncompressed > max(_MAX_PAGE_BYTES, _MAX_EXPANSION * compressed):
                raise ValueError(f"{uncompressed / 2**20:.0f} MiB in a buffer of {compressed} bytes")
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_names(reader.schema)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)  # a damaged offset would be read as an address
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)
