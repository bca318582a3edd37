"""JSON documents as a stream of rows: an array, objects over several lines, or an object around a list of rows.

A document is decoded a value at a time, so memory does not grow with the file, and a value may have as many bytes as a
line may have.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..bad_samples import BadSample
from .compressed import kind_of, open_bytes
from .row import MAX_LINE_BYTES, TURN_KEYS, Row, checked_object, overlong
from .splits import SPLIT_OF

WRAPPERS = ("data", "rows", "examples", "samples", "instances", "records", "items", *SPLIT_OF)  # keys that hold rows
_STEP = 2**18
_LONGEST_LITERAL = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_BORDER = re.compile(r'\\.|["{}\[\]]', re.DOTALL)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python refuses to convert more digits


DECODER = json.JSONDecoder(parse_int=_integer)


def parse_object(text: str, place: str) -> dict | BadSample:
    """The object that `text` is, or what is wrong with it."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        return BadSample("malformed JSON", f"{error.msg} at column {error.colno}", place)
    except (ValueError, RecursionError) as error:
        return BadSample("malformed JSON", str(error)[:100], place)
    return checked_object(value, place)


def is_document(path: Path) -> bool:
    """Whether a JSON file is a document, rather than one object per line."""
    with open_bytes(path) as file:
        lines = (
            line.removeprefix(b"\xef\xbb\xbf").strip() for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"")
        )
        filled = (line for line in lines if line)
        first, second = next(filled, b""), next(filled, b"")
    alone = _parsed(first)
    if isinstance(alone, dict):
        return not second and _wrapped_rows(alone) is not None
    if isinstance(alone, list):
        return kind_of(path) == ".json" or (not second and all(isinstance(value, dict) for value in alone))
    if isinstance(next(read_document(path), ("", None))[1], dict):
        return True
    is_broken_document = first.startswith(b"[") or (first.startswith(b"{") and _parsed(second) is None)
    return kind_of(path) == ".json" and is_broken_document


def is_one_object(path: Path) -> bool:
    """Whether a file holds one JSON object and nothing else; an overlong one does not count."""
    try:
        with open_bytes(path) as file:
            text = _Text(file)
            return isinstance(text.value(is_skipped_if_overlong=False), dict) and not text.peek()
    except (OSError, UnicodeDecodeError, _LostError):
        return False


def _parsed(line: bytes) -> object:
    try:
        return DECODER.decode(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def read_document(path: Path) -> Iterator[Row]:
    """The rows of a document. What cannot be decoded is a BadSample; the file is left where its structure is lost."""
    with open_bytes(path) as file:
        text = _Text(file)
        number = 0
        try:
            for value in _values(text):
                place = f"{path}[{number}]"
                yield place, value.at(place) if isinstance(value, BadSample) else checked_object(value, place)
                number += 1
        except _LostError as error:
            place = f"{path}:{text.line}"
            yield place, BadSample("malformed JSON", f"{error}; the rest of the file is not read", place)
            return
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield str(path), BadSample("not UTF-8", f"byte 0x{byte:02x} after {number} rows", str(path))
            return
    if not number:
        yield str(path), BadSample("empty file", "the document has no rows", str(path))


# ---- The grammar of a document ----


def _values(text: _Text) -> Iterator[object]:
    """The values of a document that are rows; a value that cannot be one is a BadSample."""
    if text.peek() == "[":
        yield from _elements(text)
        if text.peek():
            raise _LostError("more text after the array")
        return
    first = text.value(is_skipped_if_overlong=False)
    if first is None:
        yield from _list_in_object(text)
    else:
        rows = None if text.peek() or not isinstance(first, dict) else _wrapped_rows(first)
        yield from [first] if rows is None else rows
    while text.peek():
        yield text.value()


def _elements(text: _Text) -> Iterator[object]:
    """The elements of the array that begins here."""
    text.expect("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != ",":
            break
        text.expect(",")
    text.expect("]")


def _wrapped_rows(document: dict) -> list | None:
    """The rows of `{"data": [...]}`: the list of the only key, or of a key that is known to hold rows."""
    keys = [key for key, value in document.items() if isinstance(value, list) and value and _is_row(value[0])]
    keys = [key for key in keys if key in WRAPPERS or len(document) == 1]
    if len(keys) > 1:
        return [BadSample("several sets", f"one document has lists of rows under {', '.join(keys)}; give each a file")]
    return document[keys[0]] if keys else None


def _list_in_object(text: _Text) -> Iterator[object]:
    """The same for an object that is too large to be decoded at once: its first list of rows."""
    text.expect("{")
    found = False
    while text.peek() != "}":
        text.value()
        text.expect(":")
        if text.peek() == "[":
            elements = _elements(text)
            first = next(elements, None)
            if _is_row(first) and found:
                raise _LostError("a second list of rows in one document")
            if _is_row(first):
                found = True
                yield first
                yield from elements
            for _ in elements:
                pass
        else:
            text.value()
        if text.peek() != ",":
            break
        text.expect(",")
    text.expect("}")
    if not found:
        yield overlong(MAX_LINE_BYTES, "", "an object of more than ")


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and not any(key in value for key in TURN_KEYS)


class _LostError(ValueError):
    """The structure of a document is lost here."""


class _Text:
    """The decoded text of a file, of which a piece is held; `at` is where the next value begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._lines, self._has_ended = "", 0, 1, False

    @property
    def line(self) -> int:
        """The number of the line that is being read."""
        return self._lines + self._text.count("\n", 0, self._at)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def expect(self, character: str) -> None:
        """Step over `character`, which has to be next."""
        if self.peek() != character:
            raise _LostError(f"Expecting {character!r}")
        self._at += 1

    def value(self, is_skipped_if_overlong: bool = True) -> object:
        """The value that begins here; a BadSample if it is overlong or too deep.

        Without `is_skipped_if_overlong`, an overlong value gives None, and the text still stands at its beginning.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                is_complete = isinstance(value, dict | list | str) or end < len(self._text) or self._has_ended
                if is_complete and end - self._at <= MAX_LINE_BYTES:
                    self._at = end
                    return value
                message = "Expecting the end of a number"
            except json.JSONDecodeError as error:
                message = error.msg
                if not message.startswith("Unterminated") and error.pos < len(self._text) - _LONGEST_LITERAL:
                    self._at = error.pos
                    raise _LostError(message) from None
            except (ValueError, RecursionError) as error:
                self._skip()
                return BadSample("malformed JSON", str(error)[:100])
            held = len(self._text) - self._at
            if held > MAX_LINE_BYTES:
                if not is_skipped_if_overlong:
                    return None
                self._skip()
                return overlong(MAX_LINE_BYTES, "", "a value of more than ")
            if not self._read(max(_STEP, held)):
                raise _LostError(message)

    def _read(self, size: int = _STEP) -> bool:
        """Replace what was decoded by the next piece; returns False at the end of the file."""
        if self._has_ended:
            return False
        data = self._file.read(size)
        self._has_ended = not data
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at = 0
        return True

    def _skip(self) -> None:
        """Step over the value that begins here, by its brackets and quotes alone."""
        depth, in_string, position = 0, False, self._at
        if self._text[position] not in '"{[':
            raise _LostError("overlong number")
        while True:
            border = _BORDER.search(self._text, position)
            if border is None:
                cut_escape = len(self._text) > position and self._text.endswith("\\")
                self._at = len(self._text) - cut_escape
                if not self._read():
                    return
                position = 0
                continue
            position, character = border.end(), border.group()
            if character == '"':
                in_string = not in_string
            elif not in_string and character in "{}[]":
                depth += 1 if character in "{[" else -1
            if depth == 0 and not in_string:
                self._at = position
                return
