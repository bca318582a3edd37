"""Known schemas of conversations, each converted to {"messages", "tools", "masked"} (see turns.py) or {"text"}."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from qat.errors import UserError

from ..bad_samples import BadSample, shorten
from .turns import chat_of as _chat
from .turns import text_of as _text
from .turns import turns_of as _turns

COMPANIONS = frozenset({"system", "system_prompt", "history", "tools"})  # columns that any conversation may have


@dataclass(frozen=True)
class Schema:
    """A set of columns that belong together, and how a row of them becomes a sample."""

    name: str
    required: frozenset[str]
    convert: Callable[[dict], dict]
    optional: frozenset[str] = COMPANIONS

    def sample_of(self, row: dict) -> dict:
        """`row` in the common form.

        Raises:
            BadSample: other columns than this schema's, a wrong type, an empty turn, an unknown role, a lone surrogate.
        """
        if not self.required <= row.keys():
            raise mixed_schemas(row, self)
        return self.convert(_with_one_system_prompt(row))


def is_filled(value: object) -> bool:
    """Whether a column has a value: not null, NaN, an empty text or list, or lists that are all empty."""
    if isinstance(value, dict):  # how `datasets` gives a sequence of structs
        return any(map(is_filled, value.values()))
    return value is not None and value != "" and value != [] and value == value


def recognise(row: Mapping | Iterable[str]) -> Schema | None:
    """The first known schema whose columns all have values in `row`; without one, whose columns are all there."""
    return next(iter(filled_schemas(row)), None) or next(iter(_schemas_among(tuple(row))), None)


def filled_schemas(row: Mapping | Iterable[str]) -> list[Schema]:
    """All known schemas whose columns all have values in `row`, in the order in which they are preferred."""
    among = _schemas_among(tuple(row))
    if not isinstance(row, Mapping):
        return list(among)
    return [schema for schema in among if all(is_filled(row[column]) for column in schema.required)]


@lru_cache(4096)
def _schemas_among(columns: tuple[str, ...]) -> tuple[Schema, ...]:
    return tuple(schema for schema in SCHEMAS if schema.required <= set(columns))


def mixed_schemas(row: dict, expected: Schema) -> BadSample:
    """The error for a row of another schema than the rows around it."""
    found = recognise(row)
    other = f"it looks like {found.name}" if found else f"columns {_columns(row)}"
    return BadSample("mixed schemas", f"{other}, but the set began with {expected.name}")


def unknown_schema(columns: Iterable[str], where: str) -> UserError:
    """The error for columns that fit no schema: what was found, and what is known."""
    columns = list(columns)
    if "chosen" in columns:
        return UserError(
            f"{where}: columns {_columns(columns)} are those of a preference set; fine-tuning learns one answer: "
            "write the chosen one to a file of `prompt`, `completion` or of `messages`"
        )
    pairs = ", ".join(f"`{request}` and `{answer}`" for request, answer in PAIRS)
    return UserError(
        f"{where}: columns {_columns(columns)} fit no known schema. Known are a list of turns in one of "
        f"{', '.join(f'`{column}`' for column in TURN_COLUMNS)}; the pairs {pairs}; `article` and `highlights`; `text`"
    )


def _columns(columns: Iterable[str]) -> str:
    names = [shorten(name) for name in columns]
    return "[" + ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "") + "]"


# ---- One function per schema ----


def _with_one_system_prompt(row: dict) -> dict:
    """`system_prompt` under the name `system`; a system prompt without a value is left out."""
    system, other = row.get("system"), row.get("system_prompt")
    if is_filled(system) and is_filled(other) and system != other:
        raise BadSample("wrong type", "system and system_prompt are both there, and differ")
    if is_filled(system) or (system is None and not is_filled(other)):
        return row
    return {**row, "system": other if is_filled(other) else None}


def _conversation(row: dict, column: str) -> dict:
    value = row[column]
    first = value[0] if isinstance(value, list) and value else _first_of(value)
    known = first if isinstance(first, dict) else {}
    is_sharegpt = "from" in known or (column == "conversations" and "role" not in known)
    keys = ("from", "value") if is_sharegpt else ("role", "content")
    return _chat(row, _turns(value, column, *keys))


def _first_of(value: object) -> object:
    """The first turn of a conversation that is not a list: a CSV cell, or columns of turns."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return value[0] if isinstance(value, list) and value else value
    return value


def _pair(row: dict, request: str, answer: str) -> dict:
    """A question and its answer: each is a text, or a list of messages."""
    turns: list[tuple[object, object]] = []
    given = [row[column] for column in GIVEN.get(request, ()) if is_filled(row.get(column)) and column != answer]
    for column, role in ((request, "user"), (answer, "assistant")):
        value = row[column]
        if isinstance(value, list | dict):
            turns += _turns(value, column, "role", "content")
        elif role == "user":
            turns.append((role, "\n\n".join([_text(value, column), *filter(str.strip, map(_given, given))])))
        else:
            turns.append((role, value))
    return _chat(row, turns)


def _given(value: object) -> str:
    if not isinstance(value, str):
        raise BadSample("wrong type", f"the input is {shorten(value)}, not text")
    return value


def _summary(row: dict) -> dict:
    article = _text(row["article"], "article")
    return _chat(row, [("user", f"Summarize the following article.\n\n{article}"), ("assistant", row["highlights"])])


def _plain(row: dict) -> dict:
    return {"text": _text(row["text"], "text")}


def _chat_schema(column: str) -> Schema:
    name = {
        "conversations": "ShareGPT / Daring-Anteater `conversations` (`from`, `value`)",
        "messages": "OpenAI `messages` (`role`, `content`)",
    }.get(column, f"`{column}` (turns of `role`, `content` or of `from`, `value`)")
    return Schema(name, frozenset({column}), partial(_conversation, column=column))


def _pair_schema(request: str, answer: str) -> Schema:
    given = GIVEN.get(request, ())
    name = f"`{request}`, " + "".join(f"`{column}` (optional), " for column in given) + f"`{answer}`"
    name = "Alpaca `instruction`, `input` (optional), `output`" if (request, answer) == ALPACA else name
    optional = COMPANIONS | (frozenset(given) - {answer})
    return Schema(name, frozenset({request, answer}), partial(_pair, request=request, answer=answer), optional)


TURN_COLUMNS = ("conversations", "messages", "conversation", "dialog", "dialogue", "chat")
ALPACA = ("instruction", "output")
GIVEN = {"instruction": ("input", "context"), "question": ("context",), "query": ("context",)}  # below the question
PAIRS = (
    ("prompt", "completion"), ALPACA, ("question", "answer"), ("instruction", "response"), ("prompt", "response"),
    ("query", "response"), ("query", "answer"), ("question", "response"), ("instruction", "answer"),
    ("prompt", "answer"), ("prompt", "output"), ("problem", "solution"), ("input", "output"),
)  # fmt: skip
# The first schema whose columns have values is that of a row.
SCHEMAS = (
    *map(_chat_schema, TURN_COLUMNS),
    *(_pair_schema(*pair) for pair in PAIRS),
    Schema("`article`, `highlights`", frozenset({"article", "highlights"}), _summary),
    Schema("plain `text`, all of it learned", frozenset({"text"}), _plain, frozenset()),
)
