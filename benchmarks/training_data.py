"""Make training data for real models: questions from elsewhere, answered once by the teacher itself.

    python benchmarks/training_data.py --model runs/models/qwen2.5-coder-0.5b \\
      --gguf_file Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf --out runs/models/training

Questions are problems of reasoning-gym (`benchmarks/tasks/fetch.py` writes them; none is evaluated), questions about
Python's standard library, by template from its docstrings, and some that the teacher writes itself
(`benchmarks/written_questions.py`; with `--written N` these alone, N times as many). The teacher answers greedily in
its own chat template. An answer that is cut is left out, and so is a wrong one where the right one is known. The file
has a key of the teacher's weights, the questions and the settings in its name: what is there is not made again, and
an interrupted run resumes with the next piece.
Rows are {"messages": [...]}, as `--dataset` reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import written_questions  # noqa: E402
from benchmarks.arguments import use_device  # noqa: E402
from benchmarks.report import write_text  # noqa: E402
from benchmarks.tasks.generation import generate  # noqa: E402
from benchmarks.tasks.overlap import runs_of_tasks, runs_of_words  # noqa: E402
from benchmarks.tasks.problems import FOLDER, code_prompt, number_prompt, right_numbers  # noqa: E402
from benchmarks.written_questions import question_of, requests  # noqa: E402
from data.sources.python_docs import read_python_docs  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from training.arguments.model import ModelArguments  # noqa: E402
from training.backends.fingerprint import fingerprint  # noqa: E402
from training.start.loading import load_tokenizer, load_unquantized  # noqa: E402

MAX_NEW_TOKENS, PIECE = 384, 512
WRITTEN = "ask only for questions that the model writes itself, this many times; default: all kinds of questions, once"
AVOIDED = 8  # words: a question that the teacher writes has no run of them in common with an evaluated one
PROMPTS = {
    "number": lambda question: number_prompt({"question": question}),
    "code": lambda question: code_prompt({"prompt": question}),
}
_DOCUMENTATION_CHARACTERS = 1500
_TEMPLATES = (
    "{question}\nExplain it in your own words and show a short example.\n\n{answer}",
    "Here is a part of Python's documentation.\n\n{answer}\n\nWrite a Python function, with a docstring and a usage "
    "example, that makes use of it.",
)


def questions(folder: Path, written: int | None = None) -> list[dict]:
    """{"question", "answer"} in a fixed, mixed order; "answer" is the right number, or None.

    Among them {"request", "kind", "answer"}, for questions that the teacher writes.

    Args:
        folder: of benchmarks/tasks/fetch.py.
        written: give those that the teacher writes alone, this many times as many.

    Raises:
        UserError: the problems of reasoning-gym, which are needed without `written`, were not fetched.
    """
    if written is not None:
        return _mixed([{**row, "answer": None} for row in requests(written)])
    path = folder / "training.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is not there; run: python benchmarks/tasks/fetch.py --out {folder}")
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"question": number_prompt(problem), "answer": problem["answer"]}
        for problem in problems if re.fullmatch(r"-?[\d.]+", problem["answer"])
    ]  # fmt: skip
    for number, sample in enumerate(read_python_docs()):
        question, answer = (turn["value"] for turn in sample["conversations"])
        template = _TEMPLATES[number % len(_TEMPLATES)]
        text = template.format(question=question, answer=answer[:_DOCUMENTATION_CHARACTERS])
        rows.append({"question": text, "answer": None})
    rows += [{**row, "answer": None} for row in requests()]
    return _mixed(rows)


def first_questions(folder: Path, written: int | None, count: int | None) -> list[dict]:
    """The first `count` of `questions`, or all of them.

    Raises:
        UserError: there are not as many, or the problems of reasoning-gym were not fetched.
    """
    rows = questions(folder, written)
    if count is not None and count > len(rows):
        more = "" if written is None else " give a larger --written, or"
        raise UserError(
            f"--questions {count} are more than the {len(rows)} that there are;{more} leave out --questions"
        )
    return rows[:count]


def _mixed(rows: list[dict]) -> list[dict]:
    random.Random(0).shuffle(rows)
    return rows


def with_questions(model, tokenizer, rows: list[dict], batch_size: int, seed: int, avoided: set[int]) -> list[dict]:
    """`rows` in which the teacher has written the questions; those are left out that are none, or share runs."""
    asking = [row for row in rows if "request" in row]
    if not asking:
        return rows
    texts = generate(
        model, tokenizer, [row["request"] for row in asking], written_questions.MAX_NEW_TOKENS, batch_size, seed
    )
    found = [row for row in rows if "request" not in row]
    for row, (text, _) in zip(asking, texts, strict=True):  # a question is whole, or is none
        question = question_of(row["kind"], text)
        if question is not None and not runs_of_words(question, AVOIDED) & avoided:
            found.append({"question": PROMPTS[row["kind"]](question), "answer": None})
    return found


def usable(rows: list[dict], answers: list[tuple[str, bool]]) -> list[dict]:
    """Conversations of the answers that have ended and are not known to be wrong."""
    found = []
    for row, (text, has_ended) in zip(rows, answers, strict=True):
        if has_ended and text.strip() and (row["answer"] is None or right_numbers([row], [text])[0]):
            turns = (("user", row["question"]), ("assistant", text.strip()))
            found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return found


def make(
    model, tokenizer, rows: list[dict], out: Path, batch_size: int, deadline: float = float("inf"),
    share: tuple[int, int] = (0, 1), *, avoided: set[int],
) -> Path | None:  # fmt: skip
    """The file of the conversations; None where pieces are left: for the next call, or for other processes.

    Each piece of PIECE questions is written when it is answered.

    Args:
        deadline: of time.monotonic(); no piece begins after it.
        share: k and n: this process answers pieces k, k + n, ...; the last of n processes writes the file.
        avoided: runs of words (`overlap.runs_of_tasks`) that no question which the teacher writes may have.
    """
    content = [fingerprint(model), MAX_NEW_TOKENS, [row.get("question") or row["request"] for row in rows]]
    content += [written_questions.VERSION] if any("request" in row for row in rows) else []
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    target, pieces = out / f"training-{key}.jsonl", out / f"training-{key}"
    if target.exists():
        return target
    pieces.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), PIECE)
    for start in starts[share[0] :: share[1]]:
        path = pieces / f"{start:06}.jsonl"
        if path.exists():
            continue
        if time.monotonic() > deadline:
            print(f"{start} of {len(rows)} questions are answered; the next run resumes here", flush=True)
            return None
        chosen = with_questions(model, tokenizer, rows[start : start + PIECE], batch_size, start, avoided)
        asked = [row["question"] for row in chosen]
        kept = usable(chosen, generate(model, tokenizer, asked, MAX_NEW_TOKENS, batch_size))
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        end = min(start + PIECE, len(rows))
        print(f"{end} of {len(rows)} questions, {len(kept)} of {end - start} answers kept", flush=True)
    paths = [pieces / f"{start:06}.jsonl" for start in starts]
    if not all(path.exists() for path in paths):
        return None
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    first = {json.loads(line)["messages"][0]["content"]: line for line in reversed(lines)}  # no question twice
    write_text(target, "".join(reversed(first.values())))
    return target


def main(argv: list[str] | None = None) -> None:
    """Answer the questions."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the teacher")
    parser.add_argument("--gguf_file", help="its GGUF file, if that is what the folder holds")
    parser.add_argument("--tasks", type=Path, default=FOLDER, help="folder of benchmarks/tasks/fetch.py")
    parser.add_argument("--out", type=Path, default=Path("runs/models/training"))
    parser.add_argument("--questions", type=positive, help="default: all")
    parser.add_argument("--written", type=positive, help=WRITTEN)
    parser.add_argument("--batch_size", type=positive, help="default: 256 on a GPU, 8 on a CPU")
    args = parser.parse_args(argv)
    rows = first_questions(args.tasks, args.written, args.questions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use_device(device)
    avoided = runs_of_tasks(args.tasks, AVOIDED)
    arguments = ModelArguments(args.model, args.gguf_file)
    model, tokenizer = load_unquantized(arguments).to(device).eval(), load_tokenizer(arguments, 2048)
    path = make(model, tokenizer, rows, args.out, args.batch_size or (256 if device == "cuda" else 8), avoided=avoided)
    print(f"--dataset {path}")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
