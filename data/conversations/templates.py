"""A conversation as text pieces, each known to be learned or not, so that labels are exact or an error states why not.

The text is what the tokenizer's chat template renders. Which part of it an assistant turn is, is found

1. by the template's own `{% generation %}` markers, where it has them;
2. else by rendering the conversation up to the turn (with the generation prompt: what the model reads at inference) and
   through it; where both are beginnings of the whole text, what lies between them is what the model writes.

Where neither holds (Qwen3's template drops the thoughts of earlier turns, for instance) there is no exact answer, and
`InexactTemplate` is raised. The token that ends a turn belongs to the turn: a model that never learns it never stops.
"""

from __future__ import annotations

import datetime
import re

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qat.errors import UserError

from ..bad_samples import BadSample

Piece = tuple[str, bool]  # text, and whether it is learned
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "STANDINANSWER"


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


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, in pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = tokenizer.get_chat_template()
        self.has_markers = _MARKER.search(self.template) is not None
        self._variables = dict(tokenizer.special_tokens_map)
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._special_tokens = sorted((token for token in special if token), key=len, reverse=True)
        self._end_of_turn: str | None = None

    @property
    def fingerprint(self) -> list:
        """Changes with the template, what it is given, and the date if it asks for that."""
        today = datetime.date.today().isoformat() if "strftime_now" in self.template else None
        return [self.template, sorted(self._variables.items()), today]

    @property
    def method(self) -> str:
        """How answers are found, in words."""
        return "by the template's generation markers" if self.has_markers else "by incremental rendering"

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            BadSample: the template refuses it (roles that do not alternate, a system prompt it has no place for).
        """
        return self._render(messages, add_generation_prompt)[0]

    def pieces(self, messages: list[dict]) -> list[Piece]:
        """The text of a conversation, cut where answers begin and end.

        Raises:
            InexactTemplate: neither markers nor incremental rendering tell the answers exactly.
            BadSample: the template refuses the conversation.
        """
        text, spans = self._marked(messages) if self.has_markers else self._incremental(messages)
        pieces, done = [], 0
        for start, end in spans:
            pieces += [(text[done:start], False), (text[start:end], True)]
            done = end
        return [piece for piece in (*pieces, (text[done:], False)) if piece[0]]

    def _render(self, messages: list[dict], add_generation_prompt: bool = False, marked: bool = False):
        try:
            texts, spans = render_jinja_template(
                conversations=[messages], chat_template=self.template, add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked, **self._variables,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            raise BadSample("refused by the chat template", str(error)[:200]) from None
        return texts[0], spans[0] if marked else []

    # ---- Markers ----

    def _marked(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(messages, marked=True)
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != answers:
            raise InexactTemplate(f"marks {len(spans)} generations in a conversation of {answers} assistant turns")
        end_of_turn = self._end_of_marked_turn()
        return text, [(a, b + len(end_of_turn) if text.startswith(end_of_turn, b) else b) for a, b in spans]

    def _end_of_marked_turn(self) -> str:
        """The special token that follows a marked answer, if the template left it outside of the markers."""
        if self._end_of_turn is None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            text, spans = self._render(probe, marked=True)
            rest = text[spans[-1][1] :] if spans else ""
            self._end_of_turn = next((token for token in self._special_tokens if rest.startswith(token)), "")
        return self._end_of_turn

    # ---- Incremental rendering ----

    def _incremental(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        text, spans, done = self.render(messages), [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = self._text_before(messages, index), text
            if index + 1 < len(messages):
                through = self._part(messages[: index + 1])
            if not (text.startswith(before) and text.startswith(through) and done <= len(before) < len(through)):
                raise InexactTemplate("renders a turn differently depending on what follows it")
            done = self._end_of(through)
            spans.append((len(before), done))
        return text, spans

    def _text_before(self, messages: list[dict], index: int) -> str:
        """What the model reads before it writes turn `index`."""
        if index:
            return self._part(messages[:index], add_generation_prompt=True)
        # Few templates render "nothing, then a generation prompt"; an answer of one word shows where answers begin.
        return self._part([{"role": "assistant", "content": _STAND_IN}]).partition(_STAND_IN)[0]

    def _part(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        try:
            return self.render(messages, add_generation_prompt)
        except BadSample as error:
            raise InexactTemplate(f"renders a conversation but not its beginning ({error.detail})") from None

    def _end_of(self, text: str) -> int:
        """Where the last turn ends: with its closing special token (white space after it separates), or at the end."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(tuple(self._special_tokens)) else len(text)
