r"""The tasks: their problems, what a model is asked, and whether its answer is right.

lm_eval (`lm_eval_tasks.py`) and `benchmarks/real_models.py` both take prompts and scores from here. Every task is
zero-shot and greedy, in the model's own chat template. Problems are JSON Lines files that `fetch.py` writes.

* gsm8k: the 1,319 test problems, with the prompt of Qwen2.5's authors; right if the number in \boxed{} (else the last
  number) equals that of the solution. Evaluation only.
* humaneval: 164 functions, pass@1; the code block that defines the function is run with the problem's tests.
* reasoning_*: 300 problems each of three generators of reasoning-gym, by the number as in gsm8k.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tasks.answers import as_number, code_of, final_number
from benchmarks.tasks.sandbox import all_succeed
from qat.errors import UserError

FOLDER = Path("runs/models/tasks")
HELD_OUT_GENERATORS = ("gsm_symbolic", "simple_equations", "leg_counting")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the task, and of its file.
        prompt: what the model is asked, from a problem.
        score: which answers are right, from problems and answers.
        max_new_tokens: of an answer; a longer one is cut.
    """

    name: str
    prompt: Callable[[dict], str]
    score: Callable[[Sequence[dict], Sequence[str]], list[bool]]
    max_new_tokens: int = 512


def number_prompt(problem: dict) -> str:
    r"""The question, and the sentence that Qwen2.5's authors add to it."""
    return f"{problem['question'].strip()}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def code_prompt(problem: dict) -> str:
    """The beginning of a function, which is to be written as a whole."""
    return (
        "Complete this Python function. Answer with one Markdown code block that has the whole function and the "
        f"imports that it needs.\n```python\n{problem['prompt'].strip()}\n```"
    )


def right_numbers(problems: Sequence[dict], answers: Sequence[str]) -> list[bool]:
    """Whether each answer ends with the number of its problem's solution."""
    wanted = (as_number(re.sub(r"(?s).*####", "", problem["answer"]).strip()) for problem in problems)
    return [final_number(answer) == number for answer, number in zip(answers, wanted, strict=True)]


def program_of(problem: dict, answer: str) -> str:
    """The program that tests an answer: the problem's beginning, with its helpers; the answer; the tests."""
    function = problem["entry_point"]
    code = code_of(answer, function)
    separator = "\n" if re.search(rf"^\s*(async )?def {re.escape(function)}\b", code, re.MULTILINE) else ""
    # The beginning alone is a function that returns None; an answer that is its body continues it.
    return f"{problem['prompt']}{separator}{code}\n{problem['test']}\ncheck({function})\n"


def right_programs(problems: Sequence[dict], answers: Sequence[str]) -> list[bool]:
    """Whether each answer's function passes the tests of its problem."""
    return all_succeed([program_of(problem, answer) for problem, answer in zip(problems, answers, strict=True)])


TASKS = {task.name: task for task in (
    Task("gsm8k", number_prompt, right_numbers),
    Task("humaneval", code_prompt, right_programs),
    *(Task(f"reasoning_{name}", number_prompt, right_numbers) for name in HELD_OUT_GENERATORS),
)}  # fmt: skip


def read(name: str, folder: Path = FOLDER) -> list[dict]:
    """The problems of a task.

    Raises:
        UserError: they were not fetched.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        command = f"python benchmarks/tasks/fetch.py --out {folder}"
        raise UserError(f"the problems of {name} are not in {folder}; run: {command}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error as lm_eval computes it: the sample's deviation over the root of its size."""
    mean, count = math.fsum(values) / len(values), len(values)
    if count == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
