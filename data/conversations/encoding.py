"""From pieces of text to token ids and labels, cut at a maximum length.

Text that the model reads and text that it writes are tokenized apart, as they are at inference, so no token straddles
the border between them and a label is exact by construction. A tokenizer for which pieces do not join up
(SentencePiece's invisible first space) tokenizes the whole text, and its offsets must fall on the borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from qat.errors import UserError

from ..bad_samples import BadSample
from .templates import InexactTemplate

Piece = tuple[str, bool]  # text, and whether it is learned
IGNORE_INDEX = -100  # the label that torch's cross-entropy skips
_PROBES = (("\n", "x"), ("\n", " x"), (":", "x"), (".", "\n"))


@dataclass
class Encoded:
    """One training sample: int32 arrays [tokens]; labels are IGNORE_INDEX where nothing is learned, as at the first
    token. `notes` lists what the chat template dropped of it without harm."""

    input_ids: np.ndarray
    labels: np.ndarray
    was_truncated: bool
    notes: tuple[str, ...] = ()


@dataclass
class LeftOut:
    """A sample without an answer in its first max_length tokens: `needed` tokens reach the first of one."""

    needed: int


class Encoder:
    """Tokenizes pieces with a copy of a tokenizer, so that padding or truncation set elsewhere do not touch the data.

    Raises:
        UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; use the fast tokenizer of the model")
        self.max_length = max_length
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.pieces_join = all(self.backend.decode(self.ids(a) + self.ids(b)) == a + b for a, b in _PROBES)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without tokens that the tokenizer would add."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, samples: list[list[Piece]]) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids and labels of each sample, not cut.

        Raises:
            InexactTemplate: a token reaches across the border of an answer.
        """
        return self._encode_apart(samples) if self.pieces_join else map(self._encode_whole, samples)

    def _encode_apart(self, samples: list[list[Piece]]) -> Iterator[tuple[list[int], list[int]]]:
        texts = [text for pieces in samples for text, _ in pieces]
        ids = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        for pieces in samples:
            input_ids: list[int] = []
            labels: list[int] = []
            for _, learned in pieces:
                part = next(ids).ids
                input_ids += part
                labels += part if learned else [IGNORE_INDEX] * len(part)
            yield input_ids, labels

    def _encode_whole(self, pieces: list[Piece]) -> tuple[list[int], list[int]]:
        encoding = self.backend.encode("".join(text for text, _ in pieces), add_special_tokens=False)
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
        return encoding.ids, labels

    def cut(self, input_ids: list[int], labels: list[int], needed: int = 0) -> Encoded | LeftOut | BadSample:
        """A sample of at most `max_length` tokens; `needed`: about how many reach an answer that is not in these."""
        kept = np.array(labels[: self.max_length], dtype=np.int32)
        kept[:1] = IGNORE_INDEX  # no token predicts the first one
        was_truncated = len(input_ids) > self.max_length
        if (kept != IGNORE_INDEX).any():
            return Encoded(np.array(input_ids[: self.max_length], dtype=np.int32), kept, was_truncated)
        if not was_truncated:
            return BadSample("no answer left", "there is no token to learn")
        first = next((index for index, label in enumerate(labels) if index and label != IGNORE_INDEX), None)
        return LeftOut(max(needed, len(labels)) if first is None else first + 1)
