"""Totals of a set: what was tokenized, split, left without an answer or not rendered; and the lines that tell it."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from ..conversations.formatting import IGNORE_INDEX, Encoded, LeftOut

KEPT_FRACTION = 0.99  # of the samples, by the length that a warning names
_WARN_FRACTION = 0.1  # of samples left out
_MAX_LENGTHS = 1 << 20  # of samples left out, that are remembered


@dataclass
class Totals:
    """Numbers of samples and tokens of one set."""

    samples: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    truncated_samples: int = 0
    left_out_samples: int = 0
    split_conversations: int = 0
    split_samples: int = 0
    notes: Counter = field(default_factory=Counter)
    needed: array = field(default_factory=lambda: array("Q"))  # tokens that would reach the answers left out

    def add(self, conversation: list[Encoded | LeftOut]) -> list[Encoded]:
        """Count the samples of a conversation; returns those that have an answer."""
        good = [sample for sample in conversation if isinstance(sample, Encoded)]
        for sample in conversation:
            if isinstance(sample, LeftOut):
                self.left_out_samples += 1
                if len(self.needed) < _MAX_LENGTHS:
                    self.needed.append(sample.needed)
        for sample in good:
            self.samples += 1
            self.tokens += len(sample.input_ids)
            self.labelled_tokens += int((sample.labels != IGNORE_INDEX).sum())
            self.truncated_samples += sample.was_truncated
        if len(conversation) > 1:
            self.split_conversations += 1
            self.split_samples += len(conversation)
        if good and good[0].notes:
            self.notes.update(good[0].notes)
        return good

    @property
    def length_to_keep(self) -> int:
        """The max_length that leaves KEPT_FRACTION of all samples with an answer; 0 if this one does."""
        lost = int((1 - KEPT_FRACTION) * (self.samples + self.left_out_samples))
        return 0 if lost >= len(self.needed) else sorted(self.needed)[len(self.needed) - lost - 1]

    def as_dict(self) -> dict:
        """Names and numbers, for JSON."""
        names = ("samples", "tokens", "labelled_tokens", "truncated_samples", "left_out_samples")
        names += ("length_to_keep", "split_conversations", "split_samples")
        return {name: getattr(self, name) for name in names} | {"notes": dict(self.notes)}


def describe_left_out(name: str, totals: dict, max_length: int) -> tuple[str, bool]:
    """One line about samples that truncation leaves without an answer, and whether it is a warning; "" if none is.

    Args:
        totals: see `Totals.as_dict`.
    """
    count, everything = totals["left_out_samples"], totals["samples"] + totals["left_out_samples"]
    if not count:
        return "", False
    line = (
        f"{name}: left out {count:,} of {everything:,} samples ({count / everything:.1%}): they have no answer in "
        f"their first {max_length} tokens (--model_max_length)"
    )
    if count <= _WARN_FRACTION * everything:
        return line, False
    return f"{line}; {totals['length_to_keep']:,} tokens would keep {KEPT_FRACTION:.0%} of the samples", True


def describe_splits(name: str, totals: dict) -> str:
    """One line about conversations of which each answer became a sample; "" if none did."""
    if not totals["split_conversations"]:
        return ""
    return (
        f"{name}: split {totals['split_conversations']:,} conversations into {totals['split_samples']:,} samples, one "
        "per answer, because the chat template renders earlier turns otherwise (it drops their thoughts, for instance)"
    )


def describe_notes(name: str, totals: dict) -> str:
    """One line about what the chat template drops without harm and the like; "" if there is nothing."""
    if not totals["notes"]:
        return ""
    parts = [f"{note} ({count:,})" for note, count in sorted(totals["notes"].items(), key=lambda n: -n[1])]
    more = f", and {len(parts) - 12} more" if len(parts) > 12 else ""
    return f"{name}: the chat template, by number of conversations: {', '.join(parts[:12])}{more}"
