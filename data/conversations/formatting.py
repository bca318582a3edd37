"""From a conversation to token ids and labels: the assistant's turns are learned, their end-of-turn token included.

A conversation is rendered as text (templates.py), or as one text per answer where the chat template changes earlier
turns (last_answers.py), and tokenized in pieces that are learned or not (encoding.py).

Of a long conversation no more is rendered than `max_length` tokens need: LONG turns at first, then as many more as the
tokens of these suggest, until that part of their text that no later turn changes has more than `max_length` tokens.
"""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from qat.errors import UserError

from ..bad_samples import BadSample
from .encoding import IGNORE_INDEX, Encoded, Encoder, LeftOut, Piece
from .last_answers import last_answers
from .limits import LimitedTime, TookTooLong, limited_memory
from .rendering import compile_template
from .templates import Answer, ChatTemplate, InexactTemplate, Text
from .turns import TOOL_ROLES

__all__ = [
    "IGNORE_INDEX",
    "LONG",
    "TRAIN_ON",
    "Encoded",
    "Formatter",
    "LeftOut",
    "encode_conversation",
    "set_chat_template",
]
TRAIN_ON = ("assistant", "all")
LONG = 64  # turns; of a longer conversation, the part that fills max_length is rendered
_SLOW_IN_A_ROW = 3  # samples whose rendering takes too long before the template is to blame
_RENDERED = ("role", "content")


@dataclass
class _Prepared:
    """The training samples of one conversation, as pieces of text."""

    samples: list[list[Piece]]
    notes: tuple[str, ...] = ()
    beyond: tuple[LeftOut, ...] = ()  # answers that are not rendered, where each is a sample of its own
    needed: int = 0  # about how many tokens reach an answer, if none is rendered


class Formatter:
    """Formats, tokenizes and labels samples of the common form (see `data.conversations.schemas`).

    Args:
        tokenizer: a fast tokenizer; with a chat template, that is the format, else turns joined by newlines.
        max_length: samples are cut at this many tokens.
        train_on: "assistant" or "all".
        chat_template: "none" for INC's format, anything else for the tokenizer's own template.

    Raises:
        UserError: an unknown choice, a slow tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        train_on: str = "assistant",
        chat_template: str | None = None,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise UserError(f"--train_on {train_on!r} is unknown; choose one of {', '.join(TRAIN_ON)}")
        self.train_on, self.max_length = train_on, max_length
        self._encoder = Encoder(tokenizer, max_length)
        use_chat = chat_template != "none" and tokenizer.chat_template is not None
        self._chat = ChatTemplate(tokenizer) if use_chat else None
        self._as_inc = chat_template == "none"
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        self._text_bos = self._bos if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        self._slow = 0  # samples in a row whose rendering took too long

    @property
    def description(self) -> str:
        """Format and labels, in words."""
        form = "chat template" if self._chat else "turns joined by newlines"
        if not self._chat and not self._as_inc:
            form = f"no chat template: {form}, answers closed by {self._eos or 'nothing'}"
        if self.train_on == "all":
            return f"{form}; every token is learned"
        return f"{form}; assistant turns are learned, found {self._chat.method if self._chat else 'by construction'}"

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes tokens or labels: tokenizer, template, settings, library versions."""
        state = json.loads(self._encoder.backend.to_str())
        parts = (
            state, self._chat and self._chat.fingerprint, self._bos, self._eos,
            self._text_bos, self._as_inc, self.train_on, self.max_length,
            transformers.__version__, tokenizers.__version__,
        )  # fmt: skip
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def encode(self, samples: list[dict]) -> list[list[Encoded | LeftOut] | BadSample]:
        """The training samples of each conversation, or what is wrong with it.

        A conversation is one sample, or one per answer if the chat template changes earlier turns.

        Raises:
            InexactTemplate: the template does not let answers be told exactly.
            UserError: it takes too long for one sample after the other.
        """
        with limited_memory(), LimitedTime() as limit:
            prepared = [self._prepare(sample, limit) for sample in samples]
        good = [pieces for p in prepared if not isinstance(p, BadSample) for pieces in p.samples]
        ids = self._encoder.encode(good)
        return [p if isinstance(p, BadSample) else self._finished(p, ids) for p in prepared]

    # ---- Text ----

    def _prepare(self, sample: dict, limit: LimitedTime) -> _Prepared | BadSample:
        limit.begin_step()
        try:
            prepared = self._prepared(sample)
        except BadSample as error:
            return error
        except TookTooLong:
            self._slow += 1
            if self._slow == _SLOW_IN_A_ROW:
                raise UserError(
                    f"the chat template takes more than {limit.seconds:g} s for each of {self._slow} samples in a row; "
                    "give another with --chat_template FILE.jinja"
                ) from None
            return BadSample("refused by the chat template", f"it takes more than {limit.seconds:g} s")
        self._slow = 0
        return prepared

    def _prepared(self, sample: dict) -> _Prepared:
        if "text" in sample:
            return _Prepared([[p for p in ((self._text_bos, False), (sample["text"] + self._eos, True)) if p[0]]])
        messages, masked = sample["messages"], set(sample.get("masked", ()))
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in masked]
        if self.train_on == "assistant" and not answers:
            why = "all have weight 0" if masked else "nothing to learn from with --train_on assistant"
            raise BadSample("no assistant turn", why)
        if self._chat is None:
            return _Prepared([list(self._joined_by_newlines(messages, masked, sample))])
        return self._rendered(messages, sample.get("tools", []), masked)

    def _rendered(self, messages: list[dict], tools: list[dict], masked: set[int]) -> _Prepared:
        """By the chat template: whole, or of a long conversation as many turns as surely fill max_length."""
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in masked]
        count = LONG
        while True:
            part = messages[:count]
            turns = [turn for turn in answers if turn < count]
            is_split, is_whole = False, len(part) == len(messages)
            try:
                texts = [self._text(part, tools, masked)]
                settled = "" if is_whole else self._settled(texts[0], messages, tools, count)
            except InexactTemplate:
                if self.train_on == "all" or (is_whole and not turns):
                    raise
                is_split, texts = True, list(last_answers(self._chat, part, tools, turns))
                settled = texts[-1].text[: texts[-1].answers[0].start] if turns else ""
            tokens = 0 if is_whole else len(self._encoder.ids(settled))
            if is_whole or tokens > self.max_length:
                left_out = [LeftOut(tokens * (turn + 1) // count) for turn in answers[len(turns) :]]
                samples = [list(_pieces(text, masked, self.train_on == "all")) for text in texts]
                notes = tuple(dict.fromkeys(note for text in texts for note in text.notes))
                needed = left_out[0].needed if left_out and not turns else 0
                return _Prepared(samples, notes, tuple(left_out) if is_split else (), needed)
            count = max(2 * count, int(1.1 * count * self.max_length / max(tokens, 1)))

    def _text(self, messages: list[dict], tools: list[dict], masked: set[int]) -> Text:
        if self.train_on == "all" and not masked:
            return self._chat.whole(messages, tools)
        return self._chat.labelled(messages, tools)

    def _settled(self, text: Text, messages: list[dict], tools: list[dict], count: int) -> str:
        """The beginning of `text`, of `count` turns, that stays as it is when more turns follow: where more tokens than
        max_length are in it, the turns that follow need not be rendered."""
        if text.answers and not self._chat.has_markers:
            return text.text[: text.answers[-1].start]  # what stands before an answer is the same whatever follows
        longer = self._chat.renderer(tools).render(messages[: 2 * count], tools)
        return os.path.commonprefix([text.text, longer])

    def _joined_by_newlines(self, messages: list[dict], masked: set[int], sample: dict) -> Iterator[Piece]:
        """INC's format ends each turn with a newline and the sample with the end-of-sequence token (here it is learned
        after an answer). A tokenizer without a template ends each answer with that token."""
        carried = ["tools"] * ("tools" in sample) + [key for m in messages for key in m if key not in _RENDERED]
        carried += [f"the role {m['role']}" for m in messages if m["role"] in TOOL_ROLES]
        if carried:
            raise BadSample("unsupported field", f"turns joined by newlines have no place for {carried[0]}")
        everything = self.train_on == "all"
        if self._bos:
            yield self._bos, everything
        for index, message in enumerate(messages):
            is_answer = message["role"] == "assistant"
            is_learned = (is_answer or everything) and index not in masked
            if self._as_inc:
                yield message["content"] + "\n", is_learned
            else:
                yield message["content"] + self._eos * is_answer, is_learned
                yield "\n", everything
        if self._as_inc and self._eos:
            yield self._eos, is_learned

    def _finished(self, prepared: _Prepared, ids: Iterator) -> list[Encoded | LeftOut] | BadSample:
        result: list[Encoded | LeftOut] = []
        for input_ids, labels in list(islice(ids, len(prepared.samples))):  # all, also if one is bad
            sample = self._encoder.cut(input_ids, labels, prepared.needed)
            if isinstance(sample, BadSample):
                return sample
            if isinstance(sample, Encoded):
                sample.notes = prepared.notes
            result.append(sample)
        return [*result, *prepared.beyond]


def _pieces(text: Text, masked: set[int], everything: bool) -> Iterator[Piece]:
    """The text, cut where answers begin and end; `everything`: what stands between them is learned."""
    done = 0
    for answer in (*text.answers, Answer(len(text.text), len(text.text), -1)):
        for begin, end, learned in (
            (done, answer.start, everything),
            (answer.start, answer.end, answer.turn not in masked),
        ):
            if begin < end:
                yield text.text[begin:end], learned
        done = answer.end


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Give `tokenizer` the template of a .jinja file, so that it is saved with the model; None and "none" do nothing.

    Raises:
        UserError: no such file, or a file that is not a template.
    """
    if chat_template is None or chat_template == "none":
        return
    path = Path(chat_template)
    if not path.is_file():
        raise UserError(
            f"--chat_template {chat_template!r} is not a file; give a .jinja file, or none for turns joined by newlines"
        )
    name = f"--chat_template {chat_template!r}"
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read as text ({error}); give a .jinja file") from error
    if "\0" in source:
        raise UserError(f"{name} is a binary file; give a .jinja file")
    compile_template(source, name)
    tokenizer.chat_template = source


def encode_conversation(sample: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row of any known schema, cut at `max_length` tokens.

    Raises:
        UserError: an unknown schema or a bad sample.
    """
    from .schemas import recognise, unknown_schema

    schema = recognise(sample)
    if schema is None:
        raise unknown_schema(sample, "sample")
    [result] = Formatter(tokenizer, max_length).encode([schema.sample_of(sample)])
    if isinstance(result, BadSample):
        raise result
    if len(result) != 1:
        raise UserError(f"the conversation becomes {len(result)} samples, one per answer, by this chat template")
    [encoded] = result
    if isinstance(encoded, LeftOut):
        detail = f"none in the first {max_length} tokens; {encoded.needed} reach it"
        raise BadSample("no answer left", detail)
    return {"input_ids": encoded.input_ids.tolist(), "labels": encoded.labels.tolist()}
