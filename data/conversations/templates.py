"""A conversation as text whose answers are known exactly, or an error that states why they are not.

The text is what the tokenizer's chat template renders. Which part of it an assistant turn is, is found

1. by the template's own `{% generation %}` markers, where it has them;
2. else by rendering the conversation up to the turn (with the generation prompt: what the model reads at inference) and
   through it; where both are beginnings of the whole text, what lies between them is what the model writes.

Where neither holds (Qwen3's template drops the thoughts of earlier turns, for instance), `InexactTemplate` is raised;
`data.conversations.last_answers` then takes the conversation apart. The token that ends a turn belongs to the turn: a
model that never learns it never stops. Where a template writes none and the next turn begins with a special token
(GLM's `<|user|>`), that token ends the answer: it is learned, and put behind the last answer.

Rendering all beginnings of a conversation of n turns takes time that grows with n squared. Conversations of more than
WINDOW turns are therefore rendered whole once, and then window by window, each behind the first exchange. The text of
every window must be found at its place in the whole text; where one is not, the slow way decides.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qat.errors import UserError

from ..bad_samples import BadSample
from .fields import Checked, check_rendered
from .rendering import Renderer

WINDOW = 8  # turns
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "STANDINANSWER"
_END_OF_THOUGHT = "</think>"


class InexactTemplate(UserError):
    """The chat template renders turns in a way that leaves open which tokens are the answers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the chat template {self.reason}, so the tokens of the answers cannot be told exactly. Learn from every "
            "token with --train_on all, or give a template with {% generation %} markers as --chat_template FILE.jinja"
        )


@dataclass
class Answer:
    """Where an assistant turn stands in a text: from its first character to the end of its end-of-turn token."""

    start: int
    end: int
    turn: int


@dataclass
class Text:
    """A rendered conversation: its answers in order, and names of what the template drops without harm."""

    text: str
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template and finds their answers.

    Raises:
        UserError: the tokenizer's template cannot be compiled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = f"the chat template of the tokenizer {tokenizer.name_or_path!r}"
        variables = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self.plain = Renderer(_source(tokenizer, None, name), variables, name)
        self.with_tools = Renderer(_source(tokenizer, [{}], name), variables, name)  # of Command R another template
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self.special_tokens = sorted((token for token in special if token), key=len, reverse=True)
        self._bos = tokenizer.bos_token
        self._probed: dict[tuple[str, str], str] = {}  # tokens that ask for a rendering

    @property
    def fingerprint(self) -> list:
        """Changes with the template, what it is given, and the date if it asks for that."""
        sources = [self.plain.source, self.with_tools.source]
        today = datetime.date.today().isoformat() if any("strftime_now" in source for source in sources) else None
        return [sources, sorted(self.plain.variables.items()), today]

    @property
    def has_markers(self) -> bool:
        """Whether the template marks its answers."""
        return _has_markers(self.plain) or _has_markers(self.with_tools)

    @property
    def method(self) -> str:
        """How answers are found, in words."""
        return "by the template's generation markers" if self.has_markers else "by incremental rendering"

    def renderer(self, tools: list[dict]) -> Renderer:
        """The template for a conversation with `tools`, or without."""
        return self.with_tools if tools else self.plain

    def whole(self, messages: list[dict], tools: list[dict]) -> Text:
        """The conversation as it is rendered, answers not looked for.

        Raises:
            BadSample: the template refuses it, or drops something of it.
        """
        text = self.renderer(tools).render(messages, tools)
        checked = Checked(self.renderer(tools), text, messages, tools, range(len(messages)), forgets=True)
        return Text(text, notes=check_rendered(checked))

    def labelled(self, messages: list[dict], tools: list[dict]) -> Text:
        """The conversation with its answers.

        Raises:
            InexactTemplate: neither markers nor incremental rendering tell the answers exactly.
            BadSample: the template refuses the conversation, or drops something of it.
        """
        renderer = self.renderer(tools)
        if _has_markers(renderer):
            result = self._marked(renderer, messages, tools)
        else:
            result = self._incremental(renderer, messages, tools)
        for answer in result.answers:
            thought = messages[answer.turn]["content"].count(_END_OF_THOUGHT)
            if thought > result.text.count(_END_OF_THOUGHT, answer.start, answer.end):
                raise InexactTemplate("drops the thought of an answer")
        result.notes = check_rendered(Checked(renderer, result.text, messages, tools, range(len(messages))))
        return result

    # ---- Markers ----

    def _marked(self, renderer: Renderer, messages: list[dict], tools: list[dict]) -> Text:
        text, spans = renderer.render_marked(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise InexactTemplate(f"marks {len(spans)} generations in a conversation of {len(turns)} assistant turns")
        end = self._end_of_marked_turn(renderer)
        answers = [
            Answer(a, b + len(end) if text.startswith(end, b) else b, turn)
            for (a, b), turn in zip(spans, turns, strict=True)
        ]
        return Text(text, answers)

    def _end_of_marked_turn(self, renderer: Renderer) -> str:
        """The special token that follows a marked answer, if the template left it outside of the markers."""
        key = ("end", renderer.source)
        if key not in self._probed:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            text, spans = renderer.render_marked(probe)
            rest = text[spans[-1][1] :] if spans else ""
            self._probed[key] = self.special_token_at(rest, 0)
        return self._probed[key]

    # ---- Incremental rendering ----

    def _incremental(self, renderer: Renderer, messages: list[dict], tools: list[dict]) -> Text:
        text = renderer.render(messages, tools)
        if len(messages) > 2 * WINDOW:
            result = self._by_windows(renderer, messages, tools, text)
            if result is not None:
                return result
        return self._by_beginnings(renderer, messages, tools, text)

    def _by_beginnings(
        self, renderer: Renderer, messages: list[dict], tools: list[dict], text: str, first: int = 0
    ) -> Text:
        """The answers from turn `first` on, each by what is rendered before it and through it."""
        result, done = Text(text), 0
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before, through = self.text_before(renderer, messages, tools, index), text
            if index + 1 < len(messages):
                through = _part(renderer, messages[: index + 1], tools)
            if not (text.startswith(before) and text.startswith(through) and done <= len(before) < len(through)):
                raise InexactTemplate("renders a turn differently depending on what follows it")
            done, result.text = self.end_of(result.text, len(through), index + 1 == len(messages))
            result.answers.append(Answer(len(before), done, index))
        return result

    def _by_windows(self, renderer: Renderer, messages: list[dict], tools: list[dict], text: str) -> Text | None:
        """The same for a long conversation, or None where a window does not fit into `text`."""
        borders = _borders(messages)
        if not borders:
            return None
        result, head, position = Text(text), borders[0], 0
        try:
            offset = len(_part(renderer, messages[:head], tools))
            for first, last in _windows(borders, len(messages)):
                start = head if first else 0  # the first exchange stands before every window but the first
                window = [*messages[:start], *messages[first:last]]
                window_text = _part(renderer, window, tools)
                found = self._by_beginnings(renderer, window, tools, window_text, start)
                begin, end = (offset, text[:offset]) if first else (0, "")
                shift = position - begin
                position += len(window_text) - begin
                appended = found.text[len(window_text) :]  # the token of the next turn
                if last == len(messages):
                    result.text += appended
                fits = window_text.startswith(end) and result.text.startswith(
                    window_text[begin:] + appended, begin + shift
                )
                if not fits:
                    return None
                turns = first - start
                result.answers += [Answer(a.start + shift, a.end + shift, a.turn + turns) for a in found.answers]
        except InexactTemplate:
            return None
        return result if position == len(text) else None

    # ---- Borders ----

    def text_before(self, renderer: Renderer, messages: list[dict], tools: list[dict], index: int) -> str:
        """What the model reads before it writes turn `index`."""
        if index:
            return _part(renderer, messages[:index], tools, add_generation_prompt=True)
        # Few templates render "nothing, then a generation prompt"; an answer of one word shows where answers begin.
        return _part(renderer, [{"role": "assistant", "content": _STAND_IN}], tools).partition(_STAND_IN)[0]

    def end_of(self, text: str, length: int, is_last: bool) -> tuple[int, str]:
        """Where an answer ends that is rendered up to `length`, and the text with the token that ends it.

        White space behind a closing special token separates turns and is not learned. Where there is no such token, the
        special token with which the next turn begins ends the answer; behind the last turn it is put.
        """
        stripped = text[:length].rstrip()
        if stripped.endswith(tuple(self.special_tokens)):
            return len(stripped), text
        token = self._token_of_next_turn() if is_last else self.special_token_at(text, length)
        if token and token != self._bos:
            return length + len(token), text + token if is_last else text
        return length, text

    def special_token_at(self, text: str, position: int) -> str:
        """The special token that begins at `position`, or nothing."""
        return next((token for token in self.special_tokens if text.startswith(token, position)), "")

    def _token_of_next_turn(self) -> str:
        key, renderer = ("next", ""), self.plain
        if key not in self._probed:
            turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
            try:
                text, through = renderer.render(turns), renderer.render(turns[:2])
                token = self.special_token_at(text, len(through)) if text.startswith(through) else ""
            except BadSample:
                token = ""
            self._probed[key] = token
        return self._probed[key]


def _borders(messages: list[dict]) -> list[int]:
    """Turns that follow an answer, all of one role, so that every window follows the roles that it follows in truth."""
    by_role: dict[str, list[int]] = {}
    for index in range(2, len(messages)):
        if messages[index - 1]["role"] == "assistant":
            by_role.setdefault(messages[index]["role"], []).append(index)
    return max(by_role.values(), key=len, default=[])


def _windows(borders: list[int], count: int) -> list[tuple[int, int]]:
    """(first, last + 1) of windows that end before a border: of WINDOW turns, or up to the next border."""
    windows, first = [], 0
    for border, after in zip(borders, [*borders[1:], count], strict=True):
        if after - first > WINDOW and border > first:
            windows.append((first, border))
            first = border
    return [*windows, (first, count)]


def _part(renderer: Renderer, messages: list[dict], tools: list[dict], add_generation_prompt: bool = False) -> str:
    try:
        return renderer.render(messages, tools, add_generation_prompt)
    except BadSample as error:
        raise InexactTemplate(f"renders a conversation but not its beginning ({error.detail})") from None


def _has_markers(renderer: Renderer) -> bool:
    return _MARKER.search(renderer.source) is not None


def _source(tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None, name: str) -> str:
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(f"{name}: {error}; give one as --chat_template FILE.jinja") from error
