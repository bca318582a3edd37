"""benchmarks/training_data.py: which answers are kept, the key, and how it resumes."""

from __future__ import annotations

import json
import time

import pytest
from helpers import make_llama, make_tokenizer

from benchmarks import training_data
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

    def generate(model, tokenizer, questions, max_new_tokens, batch_size):
        asked.extend(questions)
        return [(f"An answer to {question}", True) for question in questions]

    monkeypatch.setattr(training_data, "generate", generate)
    monkeypatch.setattr(training_data, "PIECE", 2)
    model, tokenizer = make_llama(), make_tokenizer()
    assert training_data.make(model, tokenizer, ROWS, tmp_path, 8, deadline=time.monotonic() - 1) is None and not asked
    path = training_data.make(model, tokenizer, ROWS, tmp_path, 8)
    assert (
        asked == [row["question"] for row in ROWS] and training_data.make(model, tokenizer, ROWS, tmp_path, 8) == path
    )
    assert [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()] == asked
    (path.parent / path.stem / "000002.jsonl").unlink()
    path.unlink()
    asked.clear()
    training_data.make(model, tokenizer, ROWS, tmp_path, 8)
    assert asked == ["Question 2?", "Question 3?"]
    model.lm_head.weight.data += 1
    assert training_data.make(model, tokenizer, ROWS, tmp_path, 8) != path
    assert parse_sources(str(path))  # what --dataset reads


def test_problems_that_were_not_fetched_are_one_line(tmp_path):
    with pytest.raises(UserError, match="fetch.py --out"):
        training_data.questions(tmp_path)


def test_questions_are_numbers_and_documentation_mixed(tmp_path, monkeypatch):
    turns = [{"from": "User", "value": "What is str?"}, {"from": "Assistant", "value": "A class of text. " * 200}]
    monkeypatch.setattr(training_data, "read_python_docs", lambda: [{"conversations": turns}] * 2)
    rows = [
        {"generator": "gcd", "question": "Of 4 and 6?", "answer": "2"},
        {"question": "No number?", "answer": "Monday"},
    ]
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training_data.questions(tmp_path)
    assert [row["answer"] for row in found].count("2") == 1 and "Monday" not in [row["answer"] for row in found]
    assert len(found) == 3 and training_data.questions(tmp_path) == found
    assert all(len(row["question"]) < 2000 for row in found)
