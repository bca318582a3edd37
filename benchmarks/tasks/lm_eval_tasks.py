"""The tasks of `problems.py` for lm_eval: `lm_eval run --include_path benchmarks/tasks --apply_chat_template ...`.

`--metadata '{"folder": "DIR"}'` names the folder of the problems; by default it is that of fetch.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets  # noqa: E402

from benchmarks.tasks.problems import FOLDER, TASKS, read  # noqa: E402


def _documents(name: str, folder: str | None) -> dict[str, datasets.Dataset]:
    task = TASKS[name]
    rows = [
        {"task": name, "question": task.prompt(problem), "problem": problem}
        for problem in read(name, Path(folder or FOLDER))
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def gsm8k(folder: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Problems of GSM8K."""
    return _documents("gsm8k", folder)


def humaneval(folder: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Problems of HumanEval."""
    return _documents("humaneval", folder)


def gsm_symbolic(folder: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Problems of reasoning-gym's gsm_symbolic."""
    return _documents("reasoning_gsm_symbolic", folder)


def simple_equations(folder: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Problems of reasoning-gym's simple_equations."""
    return _documents("reasoning_simple_equations", folder)


def leg_counting(folder: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Problems of reasoning-gym's leg_counting."""
    return _documents("reasoning_leg_counting", folder)


def score(document: dict, results: list[str]) -> dict[str, float]:
    """Whether the answer is right; lm_eval adds the mean and its standard error."""
    (right,) = TASKS[document["task"]].score([document["problem"]], results[:1])
    return {"acc": float(right)}
