"""benchmarks/tasks: what counts as a right answer, what programs may do, and that lm_eval and the own engine agree."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, make_llama, make_tokenizer

from benchmarks.tasks import fetch, generation, problems, sandbox
from benchmarks.tasks.answers import code_of, final_number
from benchmarks.tasks.generation import answers
from benchmarks.tasks.overlap import shared
from benchmarks.tasks.sandbox import all_succeed, succeeds
from qat.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{{ '<a>' if add_generation_prompt }}"
)
ADDING = {
    "task_id": "X/0", "entry_point": "add", "prompt": 'def add(a, b):\n    """ a + b """\n',
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\n",
}  # fmt: skip


@pytest.mark.parametrize(
    "answer,number",
    [
        (r"So 3 + 4 = 7, \boxed{7}. Check: 8 - 1.", "7"),
        (r"\[ \boxed{\$1,234.50} \] dollars", "1234.5"),
        ("#### 18", "18"),
        ("She makes 9 * 2 = $18.", "18"),
        (r"\boxed{5}, no: \boxed{-6}", "-6"),
        (r"\boxed{x = 12}", "12"),
        ("it is .5", "0.5"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234 \text{ eggs}}", "1234"),
        (r"\boxed{3+4=7}", "7"),
        (r"\boxed{\frac{27}{3}} a day", "9"),
        (r"\boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{\frac{1}{10000000}}", "0.0000001"),
        ("#### Step 2: add\n9 + 9, so the answer is 18.", "18"),
        ("#### 18\n", "18"),
        (r"\boxed{\text{none}} of the 4", "4"),
    ],
)
def test_the_final_number_is_the_marked_one_or_else_the_last(answer, number):
    assert final_number(answer) == Decimal(number)


def test_an_answer_without_a_number_is_wrong_and_18_00_is_18():
    rows = [{"answer": "9 * 2 = <<9*2=18>>18\n#### 18"}] * 4
    assert problems.right_numbers(rows, ["none", r"\boxed{18.00}", "17", "18 ducks"]) == [False, True, False, True]


def test_of_several_code_blocks_the_one_that_defines_the_function_counts():
    answer = "Use it:\n```python\nadd(1, 2)\n```\nHere:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert code_of(answer, "add") == "def add(a, b):\n    return a + b\n"
    assert code_of("```\nx = 1\n```", "add") == "x = 1\n"
    assert code_of("```python\ndef add(a, b):\n    return", "add") == "def add(a, b):\n    return"
    assert code_of("    return a + b", "add") == "    return a + b"


@pytest.mark.parametrize(
    "before", ["", "First:\n```bash\npip install add\n```\nThen:\n", "```python\nadd(1, 2)\n```\n"]
)
def test_blocks_of_other_languages_are_no_code_and_end_where_they_end(before):
    answer = before + "```python3\ndef add(a, b):\n    return a + b\n```\nThis adds.\n```text\n3\n```\nDone."
    assert code_of(answer, "add") == "def add(a, b):\n    return a + b\n"


def test_programs_pass_as_a_whole_function_or_as_its_body_and_fail_otherwise():
    whole = "```python\ndef add(a, b):\n    return a + b\n```"
    found = problems.right_programs([ADDING] * 5, [whole, "    return a + b", "    return a - b", "", "def add(:"])
    assert found == [True, True, False, False, False]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(2**31)",
        "open('/tmp/of-a-model', 'w')",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.kill(os.getppid(), 15)",
        "import os; os.remove('/tmp/of-a-model')",
        "import os; assert 'PATH' in os.environ",
        "print('0' * 32)",
        "1 +",
        "import numpy",
    ],
)
def test_what_a_program_must_not_do_fails(program):
    program = f"{program}\n" if program.startswith("print") else f"{program}\npass\n"
    if program.startswith("print"):
        program += "raise ValueError\n"
    assert not succeeds(program, seconds=1)


def test_programs_use_the_standard_library_and_their_order_is_kept():
    right = "import math, typing, hashlib, collections, re\nassert math.sqrt(4) == 2\nhashlib.md5(b'').hexdigest()\n"
    assert all_succeed([right, "assert False", right], workers=2) == [True, False, True]


def test_standard_errors_are_those_of_the_mean():
    values = [1.0, 0.0, 1.0, 1.0]
    assert problems.mean_and_error(values) == (0.75, pytest.approx(stdev(values) / math.sqrt(4)))


def test_answers_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(0)
    model, tokenizer = make_llama().eval(), make_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    questions = ["What is 1 + 1?", "A", "A much longer question than the others are."]
    alone = [answers(model, tokenizer, [question], 8, 1)[0] for question in questions]
    assert answers(model, tokenizer, questions, 8, 2) == alone and any(alone)

    shapes, of_model = [], model.generate
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 60)  # the longest fills a batch
    monkeypatch.setattr(
        model, "generate", lambda **inputs: shapes.append(inputs["input_ids"].shape) or of_model(**inputs)
    )
    assert answers(model, tokenizer, questions, 8, 3) == alone
    assert [rows for rows, _ in shapes] == [1, 2] and all(rows * length <= 60 for rows, length in shapes), shapes


def test_lm_eval_and_the_engine_give_the_same_scores(tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = make_llama(tie_word_embeddings=False, layers=1).eval(), make_tokenizer()
    model.config.max_position_embeddings = 2048
    said = [tokenizer.eos_token_id, *tokenizer("0123456789")["input_ids"]]
    model.lm_head.weight.data[[token not in said for token in range(260)]] = 0.0  # it says numbers, and ends
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    questions = [f"{index} and {index * 7}?" for index in range(6)]
    rows = [{"question": question, "answer": "0"} for question in questions]
    texts = answers(model, tokenizer, [problems.number_prompt(row) for row in rows], 512, 1)
    for row, text, right in zip(rows, texts, (1, 0, 1, 0, 0, 1), strict=True):  # half of the answers are made right
        number = final_number(text)
        row["answer"] = f"#### {number if right and number is not None else 123456789}"
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = problems.right_numbers(rows, texts)
    assert 0 < sum(expected) < len(expected)

    manager = TaskManager(
        include_path=str(ROOT / "benchmarks" / "tasks"), include_defaults=False, metadata={"folder": str(tmp_path)}
    )
    output = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks=["local_gsm8k"], task_manager=manager,
        apply_chat_template=True, log_samples=True, bootstrap_iters=1,  # none: no standard errors
    )  # fmt: skip
    samples = sorted(output["samples"]["local_gsm8k"], key=lambda sample: sample["doc_id"])
    assert [bool(sample["acc"]) for sample in samples] == expected
    mean, error = problems.mean_and_error([float(right) for right in expected])
    found = output["results"]["local_gsm8k"]
    assert (found["acc,none"], found["acc_stderr,none"]) == (pytest.approx(mean), pytest.approx(error))


def test_problems_that_were_not_fetched_are_one_line_with_the_command(tmp_path):
    with pytest.raises(UserError, match=re.escape("run: python benchmarks/tasks/fetch.py --out")):
        problems.read("gsm8k", tmp_path)


def test_no_evaluated_problem_is_trained_on():
    """GSM8K is evaluated only, and so is gsm_symbolic, whose templates are problems of GSM8K."""
    assert "gsm_symbolic" in problems.HELD_OUT_GENERATORS and "gsm_symbolic" not in fetch.TRAINING_GENERATORS
    assert fetch.TRAINING_SEED + fetch.TRAINING_PROBLEMS < fetch.HELD_OUT_SEED
    for name in ("training_data.py", "written_questions.py"):
        source = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        assert "gsm8k" not in source.lower() and "humaneval" not in source.lower() and "text_never" not in source


def test_questions_that_are_evaluated_are_left_out_of_training(tmp_path, monkeypatch):
    def generated(generator, count, seed, folder):
        rows = [{"generator": generator, "question": f"{generator} {number % 3}", "answer": "1"} for number in range(4)]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    monkeypatch.setattr(fetch, "_generated", generated)
    for generator in problems.HELD_OUT_GENERATORS:
        row = {"generator": generator, "question": f"{generator} 1", "answer": "1"}
        (tmp_path / f"reasoning_{generator}.jsonl").write_text(json.dumps(row) + "\n")
    questions = [json.loads(line)["question"] for line in fetch.training(tmp_path).splitlines()]
    assert "leg_counting 0" in questions and "leg_counting 1" not in questions and "gcd 1" in questions
    assert len(set(questions)) == len(questions)


def test_overlap_sees_runs_of_words_whatever_the_numbers():
    training = ["Tom has 3 apples and buys 4 more, how many apples has Tom got now?"]
    same = "tom has 17 apples and buys 250 more; how many apples has tom got now"
    assert shared([same, "Nothing of this stands there at all, " * 3], training, 8) == [1.0, 0.0]
    assert shared(["short"], training) == [0.0]


@pytest.mark.parametrize("status,is_said", [(0, False), (1, True)])
def test_a_system_that_keeps_the_network_open_is_warned_of_once(status, is_said, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        sandbox.subprocess, "run", lambda words, **_: asked.append(words) or SimpleNamespace(returncode=status)
    )
    sandbox.warn_of_network.cache_clear()
    sandbox.all_succeed([]), sandbox.all_succeed([])
    sandbox.warn_of_network.cache_clear()
    assert len(asked) == 1 and ("without a network" in capsys.readouterr().err) == is_said
