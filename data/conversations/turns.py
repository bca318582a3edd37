"""Turns: what a turn of a row says, what it carries beside its text, and whether it is learned.

A turn becomes a message with `role` and `content`. Every other key that has a value (tool calls, thoughts, a name)
stays in the message and goes to the chat template; `data.conversations.fields` checks that the template renders it.
`weight`, `train` and `loss` do not go there: they decide whether an answer is learned. BOOKKEEPING says nothing to a
model and is left out; `unread` lists it, so that it can be reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..bad_samples import BadSample, shorten

TOOL_ROLES = ("tool", "function", "ipython", "observation")
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    **{role: role for role in TOOL_ROLES},
}  # fmt: skip
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "thinking", "reasoning")  # one field under the names that templates know it by
WEIGHTS = ("weight", "train", "loss")
BOOKKEEPING = frozenset({"id", "uuid", "index", "turn", "turn_id", "message_id", "timestamp", "created_at", "date"})
# Columns that say something to a model in a way that no schema reads.
_REFUSED = (
    "functions", "function_call", "documents", "image", "images", "video", "videos", "audio", "audios",
    "chat_template_kwargs",
)  # fmt: skip

Turn = tuple[object, object, dict]  # role, text, what else it carries


def is_empty(value: object) -> bool:
    """Whether a field counts as absent: null, NaN, empty text, list or object, as tables fill up what a row lacks."""
    return value is None or value == "" or value == [] or value == {} or value != value


def unread(row: dict, columns: Iterable[str]) -> set[str]:
    """Names of columns with a value, and of keys of turns, that say nothing to the model and are left out of it.

    Args:
        columns: those that are read.
    """
    known = set(columns)
    names = {name for name, value in row.items() if name not in known and not is_empty(value)}
    for column in known:
        turns = row.get(column)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and len(turn) > 2:
                names |= {f"{column}.{key}" for key in turn.keys() & BOOKKEEPING if not is_empty(turn[key])}
    return names


# ---- From a column to turns ----


def turns_of(value: object, column: str, role_key: str, text_key: str) -> list[Turn]:
    """The turns of a column: a list of objects, its JSON text, or an object of lists.

    Raises:
        BadSample: another type, a turn without role or text.
    """
    value = _parsed(value, column)
    if isinstance(value, dict) and {role_key, text_key} <= value.keys():  # how `datasets` gives a sequence of structs
        value = _turned(value, role_key)
    if not isinstance(value, list):
        raise BadSample("wrong type", f"{column} is {shorten(value)}, not a list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or role_key not in turn or not _has_text(turn, text_key):
            expected = f"an object with {role_key} and {text_key}"
            raise BadSample("wrong type", f"a turn of {column} is {shorten(turn)}, not {expected}")
        carried = {}
        if len(turn) > 2 or text_key not in turn:
            carried = {k: v for k, v in turn.items() if k not in (role_key, text_key) and not is_empty(v)}
        turns.append((turn[role_key], turn.get(text_key), carried))
    return turns


def _has_text(turn: dict, text_key: str) -> bool:
    return text_key in turn or any(not is_empty(turn.get(call)) for call in CALLS)


def _turned(columns: dict, role_key: str) -> list | dict:
    """A list of objects from an object of lists, if they are equally long."""
    lists = {name: value for name, value in columns.items() if not is_empty(value)}
    count = len(lists[role_key]) if isinstance(lists.get(role_key), list) else None
    if not all(isinstance(value, list) and len(value) == count for value in lists.values()):
        return columns
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _parsed(value: object, what: str) -> object:
    """A list or an object, from JSON text where a table could not hold it otherwise."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadSample("wrong type", f"{what} is text that is not a JSON list: {shorten(value)}") from None


# ---- From turns to a sample ----


def chat_of(row: dict, turns: Iterable[tuple]) -> dict:
    """The sample of a row: `messages`, `tools` if it has some, and `masked`, the numbers of answers not to be learned.

    Args:
        row: for its columns `system`, `history` and `tools`, and for those that no schema reads.
        turns: (role, text), or with a dictionary of what else the turn carries.

    Raises:
        BadSample: a wrong type, an empty turn, an unknown role, a lone surrogate, a field that no schema reads.
    """
    for column in _REFUSED:
        if not is_empty(row.get(column)):
            raise BadSample("unsupported field", f"the column {column} is {shorten(row[column])}")
    messages, masked = [], []
    for role, text, *carried in turns:
        message, is_masked = _message(role, text, *carried)
        if message is not None:
            if is_masked:
                masked.append(len(messages))
            messages.append(message)
    if not messages:
        raise BadSample("empty turn", "the conversation has no turns")
    before = []
    system = row.get("system")
    if not is_empty(system) and _needs_turn(system := text_of(system, "system"), messages):
        before = [{"role": "system", "content": system}]
    elif messages[0]["role"] == "system":
        before = [messages.pop(0)]
        masked = [index - 1 for index in masked]
    before += _history(row)
    messages = [*before, *messages]
    masked = [index + len(before) for index in masked]
    sample = {"messages": messages}
    if tools := _tools(row.get("tools")):
        sample["tools"] = tools
    return sample | {"masked": masked} if masked else sample


def _history(row: dict) -> list[dict]:
    """The earlier exchanges of Alpaca's `history`: pairs of a question and its answer, which is learned, too."""
    history = _parsed(row.get("history"), "history")
    if is_empty(history):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("wrong type", f"history is {shorten(history)}, not a list of pairs of question and answer")
    return [
        {"role": role, "content": text_of(text, f"a {role} turn of history")}
        for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)
    ]  # fmt: skip


def _needs_turn(system: str, messages: list[dict]) -> bool:
    first = messages[0]
    if first["role"] != "system":
        return True
    if first["content"].strip() != system.strip():
        detail = f"the column system is {shorten(system)}, the system turn {shorten(first['content'])}"
        raise BadSample("two system prompts", detail)
    return False


def _message(role: object, text: object, carried: dict | None = None) -> tuple[dict | None, bool]:
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadSample("unknown role", f"{shorten(role)}; known roles are {', '.join(ROLES)}")
    fields, is_masked = _fields(known, carried) if carried else ({}, False)
    if text in (None, "", []) and (known in ("system", *TOOL_ROLES) or any(call in fields for call in CALLS)):
        if known == "system" and not fields:
            return None, False  # "no system prompt", as some sets write it
        return {"role": known, "content": "", **fields}, is_masked
    return {"role": known, "content": text_of(text, f"the {known} turn"), **fields}, is_masked


def _fields(role: str, carried: dict) -> tuple[dict, bool]:
    """What goes to the template, and whether the turn is an answer not to be learned."""
    fields, is_masked = {}, False
    for name, value in carried.items():
        if name in WEIGHTS:
            if value not in (0, 1) or not isinstance(value, int | float):
                detail = f"{name} {shorten(value)} of the {role} turn; 0 (do not learn it) and 1 are supported"
                raise BadSample("unsupported field", detail)
            if value and role != "assistant":
                detail = f"{name} {shorten(value)} of a {role} turn; of the turns, those of the assistant are learned"
                raise BadSample("unsupported field", detail)
            is_masked |= not value and role == "assistant"
        elif name in CALLS:
            fields[name] = _calls(value, name)
        elif name not in BOOKKEEPING:
            fields[name] = value
    thoughts = [name for name in REASONING if name in fields]
    for name in thoughts[1:]:  # one thought under several names
        if fields[name] == fields[thoughts[0]]:
            del fields[name]
    if "role" in fields or "content" in fields:  # beside `from` and `value`
        raise BadSample("unsupported field", f"the {role} turn has from and value, and role or content")
    _check_text(fields, f"the {role} turn")
    return fields, is_masked


def _calls(value: object, name: str) -> object:
    """Calls with their arguments as objects: OpenAI writes them as JSON text, chat templates render objects."""
    value = _parsed(_without_nulls(value), name)
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict):
            raise BadSample("wrong type", f"{name} is {shorten(value)}, not objects")
    return [_call(call) for call in value] if isinstance(value, list) else _call(value)


def _without_nulls(value: object) -> object:
    """A value without the keys that are null, at any depth: a table gives each object the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _call(call: dict) -> dict:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _tools(value: object) -> list[dict]:
    tools = _parsed(_without_nulls(value), "tools")
    if is_empty(tools):
        return []
    if not isinstance(tools, list):
        raise BadSample("wrong type", f"tools is {shorten(tools)}, not a list")
    tools = [_parsed(tool, "a tool") for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("wrong type", f"tools is {shorten(tools)}, not a list of objects")
    _check_text(tools, "tools")
    return tools


def _check_text(value: object, what: str) -> None:
    """Raise a BadSample for text that has no UTF-8, anywhere in a value, and for what is no JSON value."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample("wrong type", f"{what} has a value that JSON cannot hold ({str(error)[:80]})") from None
    _check_utf8(text, what)


def text_of(value: object, what: str) -> str:
    """The text of a turn or a column; text parts are joined.

    Raises:
        BadSample: not text, empty, white space only, a lone surrogate, a part that is an image or the like.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_text_of_part(part, what) for part in value)
    if value is None or value == "":
        raise BadSample("empty turn", f"{what} is empty")
    if not isinstance(value, str):
        raise BadSample("wrong type", f"{what} is {shorten(value)}, not text")
    if not value.strip():
        raise BadSample("empty turn", f"{what} is white space only")
    _check_utf8(value, what)
    return value


def _text_of_part(part: dict, what: str) -> str:
    if "type" not in part:
        raise BadSample("wrong type", f"{what} has the part {shorten(part)}, which has no type")
    extra = [name for name in part if name not in ("type", "text") and not is_empty(part[name])]
    if part["type"] != "text" or extra:
        named = f"with {', '.join(map(str, extra))}" if part["type"] == "text" else f"of type {shorten(part['type'])}"
        raise BadSample("unsupported field", f"{what} has a part {named}; only text is supported")
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise BadSample("wrong type", f"{what} has a part whose text is {shorten(text)}")
    return text or ""


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = text[error.start : error.start + 1]
        raise BadSample("lone surrogate", f"{what} has {ascii(code)} at character {error.start}") from None
