"""Known schemas of conversations, each converted to {"messages", "tools", "masked"} (see turns.py) or {"text"}."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qat.errors import UserError

from ..bad_samples import BadSample, shorten
from .turns import chat_of as _chat
from .turns import text_of as _text
from .turns import turns_of as _turns


@dataclass(frozen=True)
class Schema:
    """A set of columns that belong together, and how a row of them becomes a sample."""

    name: str
    required: frozenset[str]
    convert: Callable[[dict], dict]
    optional: frozenset[str] = frozenset({"system", "history", "tools"})  # read where a row has them

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
    turns: list[tuple] = []
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


ALPACA = frozenset({"system", "history", "tools", "input"})
SCHEMAS = (
    Schema("ShareGPT / Daring-Anteater `conversations` (`from`, `value`)", frozenset({"conversations"}), _conversation),
    Schema("OpenAI `messages` (`role`, `content`)", frozenset({"messages"}), _messages),
    Schema("`prompt`, `completion`", frozenset({"prompt", "completion"}), _prompt_completion),
    Schema("Alpaca `instruction`, `input` (optional), `output`", frozenset({"instruction", "output"}), _alpaca, ALPACA),
    Schema("`article`, `highlights`", frozenset({"article", "highlights"}), _summary),
    Schema("plain `text`, all of it learned", frozenset({"text"}), _plain, frozenset()),
)
