"""Rows of CSV and TSV files; a row may have as many characters as a line may have bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..bad_samples import BadSample
from .compressed import open_bytes
from .row import MAX_LINE_BYTES, Row, overlong


class _Lines:
    """The lines of a table, for csv.reader; a row that goes on for too long ends in `_Overlong`."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._of_row = text, 0

    def begin_row(self) -> None:
        """Count from here."""
        self._of_row = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE_BYTES + 1)
        self._of_row += len(line)
        if self._of_row > MAX_LINE_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(2**20)
                self._of_row += len(line)
            raise _Overlong
        if not line:
            raise StopIteration
        return line


class _Overlong(Exception):
    pass


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    # Bytes that are not UTF-8 become lone surrogates here, and a clear error where the text is checked.
    with (
        open_bytes(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        lines = _Lines(text)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        found = False
        while True:
            lines.begin_row()
            try:
                row = next(rows, None)
            except (csv.Error, _Overlong) as error:
                place = f"{path}:{rows.line_num}"
                found = True
                is_overlong = isinstance(error, _Overlong)
                yield (
                    place,
                    overlong(MAX_LINE_BYTES, place, "a row of more than ")
                    if is_overlong
                    else BadSample("malformed CSV", str(error), place),
                )
                if header is None:  # without a header, no row can be read
                    return
                continue
            if row is None:
                break
            if not row:  # a blank line
                continue
            if header is None:
                header = row
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    yield str(path), BadSample("malformed CSV", f"the header names {twice[:60]!r} twice", str(path))
                    return
                continue
            found = True
            place = f"{path}:{rows.line_num}"
            if len(row) == len(header):
                yield place, dict(zip(header, row, strict=True))
            else:
                yield place, BadSample("malformed CSV", f"{len(row)} fields, the header names {len(header)}", place)
        if not found:
            yield str(path), BadSample("empty file", "no rows below a header", str(path))


read_csv = partial(_read_table, delimiter=",")
read_tsv = partial(_read_table, delimiter="\t")
