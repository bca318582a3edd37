"""JSON files of others: read with limits on size and depth, and named in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

_MAX_BYTES = 64 << 20  # an index of 500,000 tensors has 50 MB
_MAX_DEPTH = 100  # what reads the content afterwards (copies, checks) recurses


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        UserError: the file cannot be read, is larger than 64 MiB, is not JSON, is nested deeper than 100 levels, or
            holds something other than an object; the message names it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds {_kind(content)} and no JSON object; copy or save it again")
    return content


def read_json(path: str | Path) -> Any:
    """The same with content of any kind."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than the {_MAX_BYTES:,} that are read of a JSON file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is damaged: it is nested too deeply; copy or save it again") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: it is not JSON ({error}); copy or save it again") from error
    _check_depth(path, content)
    return content


def _check_depth(path: Path, content: Any) -> None:
    level, depth = [content], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise UserError(f"{path} is damaged: it is nested deeper than {_MAX_DEPTH} levels; copy or save it again")
        level = [value for x in level for value in (x.values() if isinstance(x, dict) else x)]


def _kind(content: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(content), "null")


def shown(value: Any) -> str:
    """A value of a JSON file as a message has it: short, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
