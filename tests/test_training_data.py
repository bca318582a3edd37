"""benchmarks/training_data.py: which answers are kept, the key, and how it resumes."""

from __future__ import annotations

import json
import time

import pytest
from helpers import make_llama, make_tokenizer

from benchmarks import training_data
from benchmarks.tasks import generation
from benchmarks.tasks.overlap import runs_of_tasks, runs_of_words
from benchmarks.tasks.problems import TASKS, number_prompt
from benchmarks.written_questions import question_of, requests
from data.sources.readers import parse_sources
from qat.errors import UserError

ROWS = [{"question": f"Question {number}?", "answer": None} for number in range(5)]


def test_answers_that_are_cut_wrong_or_empty_are_left_out():
    rows = [{"question": "1 + 1?", "answer": "2"}] * 3 + [{"question": "What is str?", "answer": None}] * 3
    found = training_data.usable(
        rows,
        [(r"\boxed{2}", True), (r"\boxed{3}", True), ("2", False), ("A class. ", True), ("A cl", False), (" ", True)],
    )
    assert found == [
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": r"\boxed{2}"}]},
        {"messages": [{"role": "user", "content": "What is str?"}, {"role": "assistant", "content": "A class."}]},
    ]


def test_pieces_resume_and_a_finished_file_is_not_made_again(tmp_path, monkeypatch):
    asked = []

    def generate(model, tokenizer, questions, max_new_tokens, batch_size, seed=None):
        asked.extend(questions)
        return [(f"An answer to {question}", True) for question in questions]

    monkeypatch.setattr(training_data, "generate", generate)
    monkeypatch.setattr(training_data, "PIECE", 2)
    model, tokenizer = make_llama(), make_tokenizer()
    assert (
        training_data.make(model, tokenizer, ROWS, tmp_path, 8, deadline=time.monotonic() - 1, avoided=set()) is None
        and not asked
    )
    path = training_data.make(model, tokenizer, ROWS, tmp_path, 8, avoided=set())
    assert (
        asked == [row["question"] for row in ROWS]
        and training_data.make(model, tokenizer, ROWS, tmp_path, 8, avoided=set()) == path
    )
    assert [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()] == asked
    (path.parent / path.stem / "000002.jsonl").unlink()
    path.unlink()
    asked.clear()
    training_data.make(model, tokenizer, ROWS, tmp_path, 8, avoided=set())
    assert asked == ["Question 2?", "Question 3?"]
    model.lm_head.weight.data += 1
    assert training_data.make(model, tokenizer, ROWS, tmp_path, 8, avoided=set()) != path
    assert parse_sources(str(path))  # what --dataset reads


def test_problems_that_were_not_fetched_are_one_line(tmp_path):
    with pytest.raises(UserError, match="fetch.py --out"):
        training_data.questions(tmp_path)


def test_questions_are_numbers_and_documentation_mixed(tmp_path, monkeypatch):
    turns = [{"from": "User", "value": "What is str?"}, {"from": "Assistant", "value": "A class of text. " * 200}]
    monkeypatch.setattr(training_data, "read_python_docs", lambda: [{"conversations": turns}] * 2)
    monkeypatch.setattr(training_data, "requests", lambda: [{"request": "Write a problem.", "kind": "number"}])
    rows = [
        {"generator": "gcd", "question": "Of 4 and 6?", "answer": "2"},
        {"question": "No number?", "answer": "Monday"},
    ]
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training_data.questions(tmp_path)
    assert [row["answer"] for row in found].count("2") == 1 and "Monday" not in [row["answer"] for row in found]
    assert len(found) == 4 and training_data.questions(tmp_path) == found
    assert [row["request"] for row in found if "request" in row] == ["Write a problem."]
    assert all(len(row["question"]) < 2000 for row in found if "question" in row)


PROBLEM = "Mara has 12 red beads and buys 3 bags of 7 blue beads. How many beads has she got?"
FUNCTION = '''import re


def words(text: str) -> int:
    """The number of words in a text."""'''


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("number", PROBLEM, PROBLEM),
        ("number", f"**Math Word Problem:**\n\n{PROBLEM}\n\n**Solution:** 33 beads, is it not?", PROBLEM),
        ("number", f"Problem: {PROBLEM}", PROBLEM),
        ("number", f"Sure! Here is another one, about beads:\n\n{PROBLEM}", PROBLEM),
        ("number", f"A bag is full. It holds:\n\n{PROBLEM}", f"A bag is full. It holds:\n{PROBLEM}"),
        ("number", f"As an AI language model, I write one alone.\n\n{PROBLEM}", None),
        ("number", PROBLEM.replace(" How", "\n\nHow"), PROBLEM.replace(" How", "\nHow")),
        ("number", PROBLEM.replace("How many", "Say how many").replace("?", "."), None),
        ("number", PROBLEM + " She has 33.", None),  # says the answer
        ("number", "How many beads has Mara got, if she has some and buys 3 more?", None),
        ("code", f"Sure:\n```python\n{FUNCTION}\n    return len(text.split())\n```\nThat is all.", FUNCTION),
        ("code", f"```python\n{FUNCTION}\n```", FUNCTION),
        ("code", FUNCTION, FUNCTION),
        ("code", "```python\ndef words(text):\n    return len(text.split())\n```", None),
        ("code", f"```python\nLIMIT = 3\n{FUNCTION}\n```", None),
        ("code", "I cannot write that.", None),
    ],
)
def test_a_question_that_the_teacher_writes_is_taken_without_what_surrounds_it(kind, text, wanted):
    assert question_of(kind, text) == wanted


def test_questions_that_the_teacher_writes_are_answered_unless_one_is_like_an_evaluated_one(tmp_path, monkeypatch):
    written = [PROBLEM, PROBLEM.replace("beads", "nails"), PROBLEM, "No problem."]
    seeds, answered = [], []

    def generate(model, tokenizer, questions, max_new_tokens, batch_size, seed=None):
        if seed is None:
            answered.extend(questions)
            return [(f"An answer to {question}", True) for question in questions]
        seeds.append(seed)
        return [(written[int(request)], True) for request in questions]

    monkeypatch.setattr(training_data, "generate", generate)
    monkeypatch.setattr(training_data, "PIECE", 2)
    rows = [{"request": str(number), "kind": "number", "answer": None} for number in range(4)]
    avoided = runs_of_words("Mara has 5 red nails and buys 2 bags of 9 blue nails.", training_data.AVOIDED)
    path = training_data.make(make_llama(), make_tokenizer(), rows, tmp_path, 8, avoided=avoided)
    asked = [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]
    assert seeds == [0, 2] and asked == [number_prompt({"question": PROBLEM})]  # no question twice
    assert not [question for question in answered if "nails" in question]


def test_requests_are_enough_and_of_both_kinds():
    found = requests()
    counts = {kind: len({row["request"] for row in found if row["kind"] == kind}) for kind in ("number", "code")}
    assert counts == {"number": 64 * 12, "code": 20 * 20} and len(found) > 5000


def test_questions_that_the_teacher_writes_can_be_all_and_more(tmp_path):
    found = training_data.questions(tmp_path, written=2)  # without the problems of reasoning-gym
    assert sorted(row["request"] for row in found) == sorted(2 * [row["request"] for row in requests()])
    assert {row["kind"] for row in found[:50]} == {"number", "code"} and found == training_data.questions(tmp_path, 2)


def test_runs_of_tasks_are_those_of_all_problems(tmp_path):
    for name in TASKS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": PROBLEM, "answer": "33"}) + "\n")
    (tmp_path / "humaneval.jsonl").write_text(json.dumps({"prompt": "def one two three four five six seven"}) + "\n")
    assert runs_of_tasks(tmp_path, 8) == runs_of_words(PROBLEM, 8) | runs_of_words(
        "def one two three four five six seven", 8
    )
    (tmp_path / "reasoning_leg_counting.jsonl").unlink()
    with pytest.raises(UserError, match=r"problems of reasoning_leg_counting are not in .*fetch.py --out"):
        runs_of_tasks(tmp_path, 8)


def test_sampled_answers_are_those_of_their_seed():
    model, tokenizer = make_llama(), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    found = [generation.generate(model, tokenizer, ["What is this?"], 12, 1, seed) for seed in (1, 1, 2, None)]
    assert found[0] == found[1] != found[2] and found[3] not in found[:3]
