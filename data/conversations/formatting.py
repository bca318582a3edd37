"""From a conversation to token ids and labels: the assistant's turns are learned, their end-of-turn token included.

Text that the model reads and text that it writes are tokenized apart, as they are at inference, so no token straddles
the border between them and a label is exact by construction. A tokenizer for which pieces do not join up
(SentencePiece's invisible first space) tokenizes the whole text, and its offsets must fall on the borders.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from qat.errors import UserError

from ..bad_samples import BadSample
from .templates import ChatTemplate, InexactTemplate, Piece

IGNORE_INDEX = -100  # the label that torch's cross-entropy skips
TRAIN_ON = ("assistant", "all")
_PROBES = (("\n", "x"), ("\n", " x"), (":", "x"), (".", "\n"))


@dataclass
class Encoded:
    """One sample: int32 arrays [tokens]; labels are IGNORE_INDEX where nothing is learned, as at the first token."""

    input_ids: np.ndarray
    labels: np.ndarray
    was_truncated: bool


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
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; use the fast tokenizer of the model")
        self.train_on, self.max_length = train_on, max_length
        # A copy, so that neither padding nor truncation set elsewhere touches the data.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        use_chat = chat_template != "none" and tokenizer.chat_template is not None
        self._chat = ChatTemplate(tokenizer) if use_chat else None
        self._as_inc = chat_template == "none"
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        self._text_bos = self._bos if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        self._pieces_join = all(self._backend.decode(self._ids(a) + self._ids(b)) == a + b for a, b in _PROBES)

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
        state = json.loads(self._backend.to_str())
        parts = (
            state, self._chat and self._chat.fingerprint, self._bos, self._eos,
            self._text_bos, self._as_inc, self.train_on, self.max_length,
            transformers.__version__, tokenizers.__version__,
        )  # fmt: skip
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def encode(self, samples: list[dict]) -> list[Encoded | BadSample]:
        """Tokens and labels of each sample, or what is wrong with it.

        Raises:
            InexactTemplate: the template does not let answers be told exactly.
        """
        pieces: list[list[Piece] | BadSample] = []
        for sample in samples:
            try:
                pieces.append(self._pieces(sample))
            except BadSample as error:
                pieces.append(error)
        good = [p for p in pieces if not isinstance(p, BadSample)]
        encoded = iter(self._encode_apart(good) if self._pieces_join else map(self._encode_whole, good))
        return [p if isinstance(p, BadSample) else self._checked(next(encoded)) for p in pieces]

    # ---- Text ----

    def _pieces(self, sample: dict) -> list[Piece]:
        if "text" in sample:
            return [piece for piece in ((self._text_bos, False), (sample["text"] + self._eos, True)) if piece[0]]
        messages = sample["messages"]
        if self.train_on == "all":
            if self._chat is not None:
                return [(self._chat.render(messages), True)]
            return [(text, True) for text, _ in self._joined_by_newlines(messages)]
        if not any(message["role"] == "assistant" for message in messages):
            raise BadSample("no assistant turn", "nothing to learn from with --train_on assistant")
        return self._chat.pieces(messages) if self._chat is not None else self._joined_by_newlines(messages)

    def _joined_by_newlines(self, messages: list[dict]) -> list[Piece]:
        """INC's format ends each turn with a newline and the sample with the end-of-sequence token (here it is learned
        after an answer). A tokenizer without a template ends each answer with that token."""
        pieces = [(self._bos, False)] if self._bos else []
        for message in messages:
            is_answer = message["role"] == "assistant"
            if self._as_inc:
                pieces.append((message["content"] + "\n", is_answer))
            else:
                pieces += [(message["content"] + self._eos * is_answer, is_answer), ("\n", False)]
        return [*pieces, (self._eos, pieces[-1][1])] if self._as_inc and self._eos else pieces

    # ---- Tokens ----

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_apart(self, samples: list[list[Piece]]) -> list[Encoded]:
        texts = [text for pieces in samples for text, _ in pieces]
        ids = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        result = []
        for pieces in samples:
            input_ids, labels = [], []
            for _, learned in pieces:
                part = next(ids).ids
                input_ids += part
                labels += part if learned else [IGNORE_INDEX] * len(part)
            result.append(self._cut(input_ids, labels))
        return result

    def _encode_whole(self, pieces: list[Piece]) -> Encoded:
        encoding = self._backend.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        labels, borders, position = [], [], 0
        for text, learned in pieces:
            position += len(text)
            borders.append((position, learned))
        current = 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            while current < len(borders) - 1 and start >= borders[current][0]:
                current += 1
            if end > borders[current][0]:
                raise InexactTemplate("lets a token reach across the border of an answer with this tokenizer")
            labels.append(token if borders[current][1] else IGNORE_INDEX)
        return self._cut(encoding.ids, labels)

    def _cut(self, input_ids: list[int], labels: list[int]) -> Encoded:
        was_truncated = len(input_ids) > self.max_length
        label_array = np.array(labels[: self.max_length], dtype=np.int32)
        label_array[:1] = IGNORE_INDEX  # no token predicts the first one
        return Encoded(np.array(input_ids[: self.max_length], dtype=np.int32), label_array, was_truncated)

    def _checked(self, encoded: Encoded) -> Encoded | BadSample:
        if (encoded.labels != IGNORE_INDEX).any():
            return encoded
        if encoded.was_truncated:
            return BadSample("no answer left", f"none in the first {self.max_length} tokens (--model_max_length)")
        return BadSample("no answer left", "there is no token to learn")


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
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def encode_conversation(sample: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row of any known schema, cut at `max_length` tokens.

    Raises:
        UserError: an unknown schema or a bad sample.
    """
    from .schemas import recognise, unknown_schema

    schema = recognise(sample)
    if schema is None:
        raise unknown_schema(sample, "sample")
    [encoded] = Formatter(tokenizer, max_length).encode([schema.sample_of(sample)])
    if isinstance(encoded, BadSample):
        raise encoded
    return {"input_ids": encoded.input_ids.tolist(), "labels": encoded.labels.tolist()}
