"""Rows of local files, one at a time, each with the place it stands at; whatever is wrong becomes a BadSample there.

Files are read as streams, compressed ones too, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..bad_samples import BadSample
from .arrow_files import read_arrow, read_parquet
from .compressed import COMPRESSIONS, kind_of, open_bytes
from .json_documents import is_document, parse_object, read_document
from .row import MAX_LINE_BYTES, Row, overlong
from .tables import read_csv, read_tsv

_HEAD_BYTES = 8192
_MAX_SKIPPED_BYTES = 2**30  # of one line


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
    kind = kind_of(path)
    if kind in BINARY_KINDS and path.suffix.lower() in COMPRESSIONS:
        yield str(path), BadSample("unreadable file", f"a compressed {kind} file; decompress it", str(path))
        return
    if kind not in BINARY_KINDS:
        with open_bytes(path) as file:
            head = file.read(_HEAD_BYTES)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            yield str(path), BadSample("not UTF-8", "the file is UTF-16; save it as UTF-8", str(path))
            return
        if b"\0" in head:
            yield str(path), BadSample("binary file", f"NUL bytes in a {kind} file", str(path))
            return
    yield from READERS[kind](path)


# ---- Lines ----


def _lines(path: Path) -> Iterator[tuple[str, str | BadSample]]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                size = len(line) + _skip_line(file, line)
                yield place, overlong(size, place)
                if size > _MAX_SKIPPED_BYTES:
                    yield place, BadSample("unreadable file", "its lines do not end; the rest is not read", place)
                    return
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield place, BadSample("not UTF-8", f"byte 0x{line[error.start]:02x} at position {error.start}", place)
                continue
            if text.strip():
                yield place, text


def _skip_line(file: BinaryIO, begun: bytes) -> int:
    """Read to the end of the line, at most `_MAX_SKIPPED_BYTES`; returns the number of bytes skipped."""
    passed, part = 0, begun
    while part and not part.endswith(b"\n") and passed <= _MAX_SKIPPED_BYTES:
        part = file.readline(2**20)
        passed += len(part)
    return passed


def _read_text(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        yield place, line if isinstance(line, BadSample) else {"text": line.rstrip("\r\n")}


def _read_json(path: Path) -> Iterator[Row]:
    """A document, or one object per line."""
    if is_document(path):
        yield from read_document(path)
        return
    for place, line in _lines(path):
        yield place, line if isinstance(line, BadSample) else parse_object(line, place)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json, ".json": _read_json, ".parquet": read_parquet, ".csv": read_csv, ".txt": _read_text,
    ".ndjson": _read_json, ".tsv": read_tsv, ".arrow": read_arrow,
}  # fmt: skip
BINARY_KINDS = (".parquet", ".arrow")
TEXT_KIND = ".txt"
