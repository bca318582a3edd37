"""Known schemas of conversations, each converted to {"messages": [{"role", "content"}]} or {"text"}."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qat.errors import UserError

from ..bad_samples import BadSample, shorten

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Schema:
    """A set of columns that belong together, and how a row of them becomes a sample."""

    name: str
    required: frozenset[str]
    convert: Callable[[dict], dict]

    def sample_of(self, row: dict) -> dict:
        """`row` in the common form.

        Raises:
            BadSample: other columns than this schema's, a wrong type, an empty turn, an unknown role, a lone surrogate.
        """
        if not self.required <= row.keys():
            found = recognise(row)
            other = f"it looks like {found.name}" if found else f"columns {_columns(row)}"
            raise BadSample("mixed schemas", f"{other}, but the set began with {self.name}")
        return self.convert(row)


def recognise(columns: Iterable[str]) -> Schema | None:
    """The first known schema whose columns are all among `columns`."""
    names = set(columns)
    return next((schema for schema in SCHEMAS if schema.required <= names), None)


def unknown_schema(columns: Iterable[str], where: str) -> UserError:
    """The error for columns that fit no schema: what was found, and what is known."""
    known = "\n".join(f"  {schema.name}" for schema in SCHEMAS)
    return UserError(f"{where}: columns {_columns(columns)} fit no known schema. Known schemas:\n{known}")


def _columns(columns: Iterable[str]) -> str:
    names = [shorten(name) for name in columns]
    return "[" + ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "") + "]"


# ---- One function per schema ----


def _conversation(row: dict) -> dict:
    return _chat(row, _turns(row["conversations"], "conversations", "from", "value"))


def _messages(row: dict) -> dict:
    return _chat(row, _turns(row["messages"], "messages", "role", "content"))


def _prompt_completion(row: dict) -> dict:
    turns: list[tuple[object, object]] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[column], list | dict):
            turns += _turns(row[column], column, "role", "content")
        else:
            turns.append((role, row[column]))
    return _chat(row, turns)


def _alpaca(row: dict) -> dict:
    request, given = _text(row["instruction"], "instruction"), row.get("input")
    if given is not None and not isinstance(given, str):
        raise BadSample("wrong type", f"input is {shorten(given)}, not text")
    question = f"{request}\n\n{given}" if given and given.strip() else request
    return _chat(row, [("user", question), ("assistant", row["output"])])


def _summary(row: dict) -> dict:
    article = _text(row["article"], "article")
    return _chat(row, [("user", f"Summarize the following article.\n\n{article}"), ("assistant", row["highlights"])])


def _plain(row: dict) -> dict:
    return {"text": _text(row["text"], "text")}


SCHEMAS = (
    Schema("ShareGPT / Daring-Anteater `conversations` (`from`, `value`)", frozenset({"conversations"}), _conversation),
    Schema("OpenAI `messages` (`role`, `content`)", frozenset({"messages"}), _messages),
    Schema("`prompt`, `completion`", frozenset({"prompt", "completion"}), _prompt_completion),
    Schema("Alpaca `instruction`, `input` (optional), `output`", frozenset({"instruction", "output"}), _alpaca),
    Schema("`article`, `highlights`", frozenset({"article", "highlights"}), _summary),
    Schema("plain `text`, all of it learned", frozenset({"text"}), _plain),
)


# ---- Shared parts ----


def _turns(value: object, column: str, role_key: str, text_key: str) -> list[tuple[object, object]]:
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadSample("wrong type", f"{column} is text that is not a JSON list: {shorten(value)}") from None
    if isinstance(value, dict) and {role_key, text_key} <= value.keys():  # how `datasets` gives a sequence of structs
        roles, texts = value[role_key], value[text_key]
        if isinstance(roles, list) and isinstance(texts, list) and len(roles) == len(texts):
            return list(zip(roles, texts, strict=True))
    if not isinstance(value, list):
        raise BadSample("wrong type", f"{column} is {shorten(value)}, not a list of turns")
    for turn in value:
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            expected = f"an object with {role_key} and {text_key}"
            raise BadSample("wrong type", f"a turn of {column} is {shorten(turn)}, not {expected}")
    return [(turn[role_key], turn[text_key]) for turn in value]


def _chat(row: dict, turns: list[tuple[object, object]]) -> dict:
    system = row.get("system")
    messages = [{"role": "system", "content": _text(system, "system")}] if system not in (None, "") else []
    for role, text in turns:
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise BadSample("unknown role", f"{shorten(role)}; known roles are {', '.join(ROLES)}")
        if known == "system" and text in (None, ""):
            continue  # "no system prompt", as some sets write it
        messages.append({"role": known, "content": _text(text, f"the {known} turn")})
    if not messages:
        raise BadSample("empty turn", "the conversation has no turns")
    return {"messages": messages}


def _text(value: object, what: str) -> str:
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in value)
    if value is None or value == "":
        raise BadSample("empty turn", f"{what} is empty")
    if not isinstance(value, str):
        raise BadSample("wrong type", f"{what} is {shorten(value)}, not text")
    if not value.strip():
        raise BadSample("empty turn", f"{what} is white space only")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = value[error.start : error.start + 1]
        raise BadSample("lone surrogate", f"{what} has {ascii(code)} at character {error.start}") from None
    return value
