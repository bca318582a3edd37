"""How much of an evaluation text stands in training text, by runs of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.tasks.problems import TASKS, read

WORDS = 13  # of a run that is no coincidence, as in GPT-3's report (Brown et al. 2020, appendix C)
_DISTINCT = 5  # words; runs with fewer are lists of numbers and the like


def runs_of_words(text: str, length: int = WORDS) -> set[int]:
    """Hashes of all runs of `length` words, without case and punctuation, all numbers alike; no monotonous ones."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    words = ["0" if word[0].isdigit() else word for word in words]
    runs = (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
    return {hash(run) for run in runs if len(set(run)) >= min(_DISTINCT, length)}


def shared(texts: Sequence[str], training: Iterable[str], length: int = WORDS) -> list[float]:
    """For each text the fraction of its runs of words that also stand in a training text."""
    seen: set[int] = set()
    for text in training:
        seen |= runs_of_words(text, length)
    own = [runs_of_words(text, length) for text in texts]
    return [len(runs & seen) / len(runs) if runs else 0.0 for runs in own]


def runs_of_tasks(folder: Path, length: int) -> set[int]:
    """The runs of words of all problems that are evaluated.

    Raises:
        UserError: those of a task were not fetched.
    """
    found: set[int] = set()
    for name in TASKS:
        for problem in read(name, folder):
            found |= runs_of_words(str(problem.get("question", problem.get("prompt"))), length)
    return found
