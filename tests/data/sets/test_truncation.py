"""What truncation leaves without an answer is left out and counted; what a template drops or splits is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from chats import FORGETFUL, SMOLLM2, TOOL, assistant, call, make_chat_tokenizer, make_real_tokenizer, tool, user

from data.conversations.formatting import Encoded, LeftOut
from data.sets.totals import Totals, describe_left_out
from qat.errors import UserError
from utils import make_supervised_data_module


def write(path: Path, long: int, short: int) -> Path:
    """Chats of which `long` have questions of more than 300 tokens."""
    rows = [[user(f"{i} " + "x" * 300 * (i < long)), assistant(f"a{i}")] for i in range(long + short)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def read(path: Path, tmp_path: Path, max_length: int, **kwargs) -> dict:
    tokenizer = make_chat_tokenizer(kwargs.pop("template", SMOLLM2), max_length)
    return make_supervised_data_module(
        str(path), kwargs.pop("tokenizer", tokenizer), data_cache_dir=str(tmp_path / "cache"), **kwargs
    )


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, "data")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_samples_without_an_answer_are_left_out_and_counted_under_both_policies(tmp_path, caplog, policy):
    path = write(tmp_path / "c.jsonl", 2, 48)
    held_out = write(tmp_path / "e.jsonl", 0, 1)
    held_out.write_text(held_out.read_text().replace("a0", "b"))
    module = read(path, tmp_path, 128, on_bad_sample=policy, eval_dataset=str(held_out))
    assert len(module["train_dataset"]) == 48
    [record] = [r for r in caplog.records if "left out" in r.message]
    assert "train: left out 2 of 50 samples (4.0%)" in record.message and "--model_max_length" in record.message
    assert record.levelno == logging.INFO and "skipped" not in caplog.text


def test_above_a_tenth_the_length_that_would_keep_99_percent_is_told_and_keeps_them(tmp_path, caplog):
    path, held_out = write(tmp_path / "c.jsonl", 20, 80), write(tmp_path / "e.jsonl", 0, 1)
    held_out.write_text(held_out.read_text().replace("a0", "b"))
    read(path, tmp_path, 128, eval_dataset=str(held_out))
    [record] = [r for r in caplog.records if "left out" in r.message]
    assert record.levelno == logging.WARNING and "20 of 100 samples" in record.message
    length = _length(record.message)
    assert len(read(path, tmp_path, length, eval_dataset=str(held_out))["train_dataset"]) >= 99
    assert len(read(path, tmp_path, length - 10, eval_dataset=str(held_out))["train_dataset"]) < 99


def _length(message: str) -> int:
    return int(message.partition(" tokens would keep 99%")[0].split()[-1].replace(",", ""))


def test_nothing_left_is_an_error_that_names_the_argument_and_the_length_needed(tmp_path):
    path = write(tmp_path / "c.jsonl", 12, 0)
    with pytest.raises(UserError, match=r"--model_max_length 128: none of the 11 training.* keep 99%") as raised:
        read(path, tmp_path, 128)
    assert len(read(path, tmp_path, _length(str(raised.value)))["train_dataset"]) == 11
    with pytest.raises(UserError, match=r"--model_max_length 128.*keep 99%"):
        read(path, tmp_path, 128, streaming=True)


def test_a_stream_tells_what_it_leaves_out(tmp_path, caplog):
    path = write(tmp_path / "c.jsonl", 20, 30)
    stream = read(path, tmp_path, 128, streaming=True, eval_size=2)["train_dataset"]
    assert len(list(stream)) == 28
    assert "stream so far: left out" in caplog.text and "tokens would keep 99%" in caplog.text


def test_the_length_to_keep_is_that_of_the_samples_by_count():
    totals = Totals()
    one = Encoded(np.zeros(3, np.int32), np.array([-100, 0, 0], np.int32), False)
    for needed in range(101, 131):
        totals.add([LeftOut(needed)])
    for _ in range(270):
        totals.add([one])
    assert totals.length_to_keep == 127  # 3 of 300 may be lost
    line, is_warning = describe_left_out("train", totals.as_dict(), 100)
    assert not is_warning and "30 of 300 samples (10.0%)" in line
    totals.add([LeftOut(1000)])
    assert describe_left_out("train", totals.as_dict(), 100)[1]
    assert describe_left_out("train", Totals(samples=5).as_dict(), 100) == ("", False)


def test_conversations_that_are_split_and_fields_that_are_not_read_are_told(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    rows = [{"id": i, "messages": [user(f"{i}"), assistant("a"), user(), assistant("b")]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # built, and from the cache
        caplog.clear()
        module = read(path, tmp_path, 128, eval_size=2, template=FORGETFUL)
        assert len(module["train_dataset"]) == 20 and len(module["eval_dataset"]) == 4
        assert "train: split 10 conversations into 20 samples, one per answer" in caplog.text
        assert "fields that are not read, by number of samples: 'id' (12)" in caplog.text
    streamed = list(read(path, tmp_path, 128, eval_size=2, template=FORGETFUL, streaming=True)["train_dataset"])
    assert len(streamed) == 20 and "stream so far: split" in caplog.text


def test_links_that_the_template_drops_are_told(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    messages = [assistant(None, tool_calls=[call(zone="CET")]), tool(), assistant("noon")]
    path.write_text(
        "".join(json.dumps({"messages": [user(f"{i}"), *messages], "tools": [TOOL]}) + "\n" for i in range(9))
    )
    read(path, tmp_path, 4096, tokenizer=make_real_tokenizer("llama31"), eval_size=1)
    assert "train: the chat template, by number of conversations: drops tool_call_id (8)" in caplog.text


PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_that_end_with_nothing_special_are_warned_of_with_the_remedy(tmp_path, caplog, streaming):
    path = write(tmp_path / "c.jsonl", 0, 12)
    read(path, tmp_path, 128, template=SMOLLM2, streaming=streaming)
    assert "no special token" not in caplog.text
    read(path, tmp_path, 128, template=PLAIN, streaming=streaming)
    [record] = [r for r in caplog.records if "no special token" in r.message]
    assert record.levelno == logging.WARNING and "'\\n' is the last" in record.message
    assert "ends assistant turns with '<|im_end|>': --chat_template FILE.jinja" in record.message
