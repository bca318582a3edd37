"""Rows of local files, one at a time, each with the place it stands at; whatever is wrong becomes a BadSample there.

A .jsonl, .csv, .txt or .parquet file is read as a stream, so memory does not grow with it; a .json file that holds one
array is read as a whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..bad_samples import BadSample, shorten

MAX_LINE_BYTES = 8 * 2**20  # a longer line is not a conversation; it is never held in memory as a whole
_HEAD_BYTES = 8192
_PARQUET_BATCH_ROWS = 64

Row = tuple[str, "dict | BadSample"]  # the place, then what stands there


def read_file(path: Path) -> Iterator[Row]:
    """All rows of a file, in its order; blank lines are skipped."""
    try:
        yield from _read_checked(path)
    except OSError as error:
        yield str(path), BadSample("unreadable file", error.strerror or str(error)[:100], str(path))


def _read_checked(path: Path) -> Iterator[Row]:
    if path.stat().st_size == 0:
        yield str(path), BadSample("empty file", "", str(path))
        return
    if path.suffix.lower() != ".parquet":
        with path.open("rb") as file:
            if b"\0" in file.read(_HEAD_BYTES):
                yield str(path), BadSample("binary file", f"NUL bytes in a {path.suffix} file", str(path))
                return
    yield from READERS[path.suffix.lower()](path)


# ---- Lines ----


def _lines(path: Path) -> Iterator[tuple[str, str | BadSample]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                size = len(line) + _skip_line(file, line)
                detail = f"{size / 2**20:.1f} MiB, the limit is {MAX_LINE_BYTES / 2**20:g}; split the document"
                yield place, BadSample("overlong line", detail, place)
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield place, BadSample("not UTF-8", f"byte 0x{line[error.start]:02x} at position {error.start}", place)
                continue
            if text.strip():
                yield place, text


def _skip_line(file: BinaryIO, begun: bytes) -> int:
    """Read to the end of the line; returns the number of bytes skipped."""
    passed, part = 0, begun
    while part and not part.endswith(b"\n"):
        part = file.readline(2**20)
        passed += len(part)
    return passed


def _read_text(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        yield place, line if isinstance(line, BadSample) else {"text": line.rstrip("\r\n")}


def _read_jsonl(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        yield place, line if isinstance(line, BadSample) else _parse_object(line, place)


def _parse_object(text: str, place: str) -> dict | BadSample:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadSample("malformed JSON", f"{error.msg} at column {error.colno}", place)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return BadSample("malformed JSON", str(error)[:100], place)
    return _object(value, place)


def _object(value: object, place: str) -> dict | BadSample:
    return value if isinstance(value, dict) else BadSample("wrong type", f"{shorten(value)} is not an object", place)


# ---- Whole documents and tables ----


def _read_json(path: Path) -> Iterator[Row]:
    """One array of objects, or one object per line."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        yield place, BadSample("malformed JSON", f"{error.msg} at column {error.colno}", place)
        return
    except (ValueError, RecursionError) as error:
        yield str(path), BadSample("malformed JSON", str(error)[:100], str(path))
        return
    if not rows:
        yield str(path), BadSample("empty file", "the array has no elements", str(path))
    for number, value in enumerate(rows):
        place = f"{path}[{number}]"
        yield place, _object(value, place)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    # Bytes that are not UTF-8 become lone surrogates here, and a clear error where the text is checked.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        header: list[str] | None = None
        found = False
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                place = f"{path}:{rows.line_num}"
                found = True
                yield place, BadSample("malformed CSV", str(error), place)
                if header is None:  # without a header, no row can be read
                    return
                continue
            if row is None:
                break
            if not row:  # a blank line
                continue
            if header is None:
                header = row
                continue
            found = True
            place = f"{path}:{rows.line_num}"
            if len(row) == len(header):
                yield place, dict(zip(header, row, strict=True))
            else:
                yield place, BadSample("malformed CSV", f"{len(row)} fields, the header names {len(header)}", place)
        if not found:
            yield str(path), BadSample("empty file", "no rows below a header", str(path))


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, TypeError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        yield str(path), BadSample("unreadable Parquet", f"after {number} rows: {detail[:160]}", str(path))
        return
    if not number:
        yield str(path), BadSample("empty file", "a table without rows", str(path))


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv, ".txt": _read_text}
