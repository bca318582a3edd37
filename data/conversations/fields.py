"""Whether a chat template renders what the turns of a conversation say and carry: nothing may be dropped in silence.

The text of ordinary turns is looked up in what was rendered. What else a turn carries, and the tools, are looked up by
rendering once more with marks in their place: every text, number and free key (the name of an argument) becomes a word
that occurs nowhere else. A mark that is missing from the text is a field that the template drops. What cannot be marked
(true, a template that refuses marks) is left out instead: then the text must change.

A dropped field is a bad sample, unless it only links turns (the id of a call, the name of the tool that answers) or is
a detail of a tool's description; these are returned, so that they can be reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..bad_samples import BadSample
from .rendering import Renderer
from .turns import REASONING, TOOL_ROLES

_LINKS = ("tool_call_id", "name")  # of a tool's turn: which call it answers, which the order of turns says, too
_KEPT = ("type", "id", "index", "role", "tool_call_id")  # templates compare them, or ask for their length
_THOUGHT_TAG = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")
_NAME_OF_TOOL = re.compile(r"tools\[\d+\](\.function)?\.name")
_MARK = re.compile(r"qzmark\d+zq|7071\d{6}")
_SHORT = 8  # characters; a system prompt of fewer may stand in other text by chance
_TOOLS = -1  # in place of the number of a turn


@dataclass(frozen=True)
class Place:
    """A field: the number of its turn, its key, and its path from there."""

    turn: int
    key: str
    path: str


@dataclass
class _Marks:
    """Copies of values with a mark in the place of each leaf; `places` says where each mark stands."""

    turn: int = 0
    key: str = ""
    places: dict[str, Place] = field(default_factory=dict)

    def content(self, text: str) -> str:
        """Marks between the tags of thoughts, by which templates take text apart."""
        parts = _THOUGHT_TAG.split(text)
        for i in range(0, len(parts), 2):
            if word := parts[i].strip():
                before, _, after = parts[i].partition(word)
                parts[i] = before + self._mark("thought" if i and parts[i - 1][1] != "/" else "content") + after
        return "".join(parts)

    def value(self, value: object, path: str, free: bool = False) -> object:
        """`free`: the keys of `value` are no part of the format, but say something themselves."""
        if isinstance(value, str):
            return self._mark(path) if value.strip() else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(self._mark(path, "7071{:06}"))
        if isinstance(value, list):
            return [self.value(item, f"{path}[{i}]", free) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        marked = {}
        for key, item in value.items():
            inside = f"{path}.{key}"
            if key in _KEPT and not free:
                marked[key] = item
            elif self.turn == _TOOLS:  # a JSON schema: below `properties` are names, and below these the format again
                marked[self._mark(inside) if free else key] = self.value(item, inside, not free and key == "properties")
            else:
                marked[self._mark(inside) if free else key] = self.value(item, inside, free or key == "arguments")
        return marked

    def _mark(self, path: str, form: str = "qzmark{}zq") -> str:
        mark = form.format(len(self.places))
        self.places[mark] = Place(self.turn, self.key, path)
        return mark


@dataclass
class Checked:
    """A conversation and its text, for `check_rendered`."""

    renderer: Renderer
    text: str
    messages: list[dict]
    tools: list[dict]
    turns: range  # which turns to check
    forgets: bool = False  # whether thoughts of earlier answers may be dropped


def check_rendered(checked: Checked) -> list[str]:
    """What the template drops that is a link or a detail, as in "drops tool_call_id".

    Raises:
        BadSample: it drops anything else.
    """
    position = 0
    for index in checked.turns if not checked.tools else ():
        message = checked.messages[index]
        content = message["content"].strip()
        found = checked.text.find(content, position)
        is_short = message["role"] == "system" and len(content) < _SHORT
        if found < 0 or is_short or len(message) > 2 or message["role"] in TOOL_ROLES:
            break
        position = found + len(content)
    else:
        if not checked.tools:
            return []
    return _judged(checked, _missing_marks(checked))


def _missing_marks(checked: Checked) -> list[Place]:
    marks, messages = _Marks(), list(checked.messages)
    for index in checked.turns:
        marks.turn, messages[index] = index, dict(messages[index])
        for key, value in checked.messages[index].items():
            marks.key = key
            if key not in _KEPT:
                messages[index][key] = marks.content(value) if key == "content" else marks.value(value, key)
    marks.turn, marks.key = _TOOLS, "tools"
    tools = marks.value(checked.tools, "tools")
    try:
        rendered = set(_MARK.findall(checked.renderer.render(messages, tools)))
    except BadSample:  # the template compares what was marked
        rendered, marks.places = set(), {}
    missing = [place for mark, place in marks.places.items() if mark not in rendered]
    marked = {(place.turn, place.key) for place in marks.places.values()}
    return [*_whole(missing, marks), *_unchanged(checked, marked)]


def _whole(missing: list[Place], marks: _Marks) -> list[Place]:
    """One place for a field of which nothing is rendered, in place of all that are in it."""
    lost: dict[tuple[int, str], list[Place]] = {}
    for place in missing:
        lost.setdefault((place.turn, place.key), []).append(place)
    sizes: dict[tuple[int, str], int] = {}
    for place in marks.places.values():
        sizes[place.turn, place.key] = sizes.get((place.turn, place.key), 0) + 1
    return [
        p for key, places in lost.items()
        for p in ([Place(*key, key[1])] if len(places) == sizes[key] and key[1] != "content" else places)
    ]  # fmt: skip


def _unchanged(checked: Checked, marked: set[tuple[int, str]]) -> list[Place]:
    """Fields without marks that can be left out without a change of the text."""
    missing = []
    for index in checked.turns:
        message = checked.messages[index]
        for key in message.keys() - {"role", "content"}:
            if key == "tool_call_id" and str(message[key]) not in checked.text:
                missing.append(Place(index, key, key))
            elif key != "tool_call_id" and (index, key) not in marked:
                rest = {name: value for name, value in message.items() if name != key}
                without = [*checked.messages[:index], rest, *checked.messages[index + 1 :]]
                missing += [Place(index, key, key)] * _is_same(checked, without, checked.tools)
        if not marked and message["content"].strip() not in checked.text:
            missing.append(Place(index, "content", "content"))
    if checked.tools and (_TOOLS, "tools") not in marked:
        missing += [Place(_TOOLS, "tools", "tools")] * _is_same(checked, checked.messages, [])
    return missing


def _is_same(checked: Checked, messages: list[dict], tools: list[dict]) -> bool:
    try:
        return checked.renderer.render(messages, tools) == checked.text
    except BadSample:
        return False  # the template needs the field


def _judged(checked: Checked, missing: list[Place]) -> list[str]:
    """Raise for the places that matter; list the others, without numbers."""
    names: list[str] = []
    refused: list[str] = []
    for place in missing:
        role = checked.messages[place.turn]["role"] if place.turn != _TOOLS else ""
        is_link = place.key in _LINKS and role in TOOL_ROLES
        is_detail = place.turn == _TOOLS and place.path != "tools" and not _NAME_OF_TOOL.fullmatch(place.path)
        is_thought = place.path == "thought" or place.key in REASONING
        is_earlier = role == "assistant" and place.turn != len(checked.messages) - 1
        is_forgotten = checked.forgets and is_thought and is_earlier
        if is_link or is_detail or is_forgotten:
            what = "thoughts of earlier turns" if is_forgotten else re.sub(r"\[\d+\]", "[]", place.path)
            names.append(f"drops {what}")
        else:
            refused.append(place.path + (f" of the {role} turn {place.turn + 1}" if role else ""))
    refused = list(dict.fromkeys(refused))
    if refused:
        more = f" and {len(refused) - 3} more fields" if len(refused) > 3 else ""
        raise BadSample("unsupported field", f"the chat template does not render {', '.join(refused[:3])}{more}")
    return names
