"""The file of --config: arguments by name, turned into the words of a command line, so that one parser reads both."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path

import yaml

from qat.command_line import suggestion
from qat.errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")
_SCALARS = (str, int, float, bool, datetime.date)


def read_config(path: str | Path) -> dict:
    """The arguments in a file, by name.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not a mapping from names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_json = Path(path).suffix == ".json"
        content = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, Loader=_UniqueKeys)
    except json.JSONDecodeError as error:
        raise UserError(f"--config {str(path)!r}, line {error.lineno} cannot be read: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {str(path)!r}{line} cannot be read: {error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {str(path)!r} cannot be read: {reason}") from error
    except RecursionError:
        raise UserError(f"--config {str(path)!r} cannot be read: its values are nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {str(path)!r} is not a mapping from arguments to values, such as max_steps: 1000")
    return content


def _unique(pairs: list[tuple]) -> dict:
    """The same for JSON: a ValueError for a key that stands twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it holds {name!r} twice")
    return dict(pairs)


class _UniqueKeys(yaml.SafeLoader):
    """A mapping that holds a key twice is an error; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """See yaml.SafeLoader."""
        keys: list = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.MarkedYAMLError(problem=f"it holds {key!r} twice", problem_mark=key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


def as_flags(content: dict, path: str | Path, groups: Sequence[type]) -> list[str]:
    """The command-line words for the arguments in a file; null leaves an argument out.

    Args:
        content: the arguments by name.
        path: of the file, for messages.
        groups: the dataclasses that have the arguments.

    Raises:
        UserError: a name that is not an argument, the message suggests the nearest one; or a value that no flag can
            have.
    """
    known = {field.name: field for group in groups for field in fields(group) if field.init}
    words: list[str] = []
    for name, value in content.items():
        if name not in known:
            nearest = suggestion(str(name), known)
            raise UserError(f"--config {str(path)!r}: {name!r} is not an argument of main.py{nearest}")
        if isinstance(value, list):
            _check_list(known[name], value, path)
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            if not isinstance(value, (*_SCALARS, dict)):
                raise UserError(f"--config {str(path)!r}: {name} is a {type(value).__name__}; give a text or a number")
            words.append(f"--{name}={_json(name, value, path) if isinstance(value, dict) else value}")
    return words


def _check_list(field: Field, value: list, path: str | Path) -> None:
    if len(value) > 1 and not str(field.type).startswith("list"):
        raise UserError(f"--config {str(path)!r}: {field.name} is a list, {value}; give one value")
    if not all(isinstance(item, _SCALARS) for item in value):
        raise UserError(f"--config {str(path)!r}: {field.name} holds more than texts and numbers; give a plain list")


def _json(name: str, value: dict, path: str | Path) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"--config {str(path)!r}: {name} cannot be written as JSON ({error})") from error
