"""What is held out, and what is not."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from helpers import make_tokenizer

from qat.errors import UserError
from utils import make_supervised_data_module


def write(path: Path, *answers: object) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": f"{answer}?", "completion": f"{answer}"}) for answer in answers))
    return path


def read(spec: object, tmp_path: Path, **options) -> tuple[Counter, Counter | None]:
    """How often each sample is in the training and the evaluation set."""
    options = {"data_cache_dir": str(tmp_path / "cache"), **options}
    module = make_supervised_data_module(str(spec), make_tokenizer(), **options)
    sets = (module["train_dataset"], module["eval_dataset"])
    return tuple(samples and Counter(bytes(i % 256 for i in s["input_ids"]) for s in samples) for samples in sets)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_copies_is_divided_by_content(tmp_path, streaming, caplog):
    path = write(tmp_path / "c.jsonl", *[*range(10)] * 2)
    caplog.set_level(logging.INFO)
    for count, options in ((2 - streaming, {}), (5, {"eval_size": 5})):
        train, held_out = read(path, tmp_path, streaming=streaming, **options)
        assert len(held_out) == held_out.total() == count and not train.keys() & held_out.keys()
        assert train == dict.fromkeys(train, 2) and len(train) == 10 - count
    assert streaming or "10 of 20 samples are copies of others" in caplog.text
    assert streaming or "left 10 copies" not in caplog.text and "left 5 copies of held-out samples" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_more_than_there_is_cannot_be_held_out(tmp_path, streaming):
    path = write(tmp_path / "c.jsonl", *[*range(5)] * 2)
    with pytest.raises(UserError, match="--eval_size 5 is more than .* 4 samples are available"):
        read(path, tmp_path, streaming=streaming, eval_size=5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("answers", [["a"], ["a"] * 6])
def test_one_sample_is_enough_to_train_on_if_nothing_is_evaluated(tmp_path, answers, streaming):
    path = write(tmp_path / "c.jsonl", *answers)
    train, held_out = read(path, tmp_path, streaming=streaming, evaluate=False)
    assert list(train.values()) == [len(answers)] and held_out is None
    with pytest.raises(UserError, match="all samples are alike, so none can be held out.*give --eval_dataset"):
        read(path, tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_held_out_depends_on_the_data_and_not_on_whether_it_is_evaluated(tmp_path, streaming):
    path = write(tmp_path / "c.jsonl", *range(30))
    assert read(path, tmp_path, streaming=streaming) == read(path, tmp_path, streaming=streaming, evaluate=False)
    train, held_out = read(path, tmp_path, streaming=streaming, evaluate=False, eval_dataset="none")
    assert len(train) == 30 and held_out is None
    for options in ({"evaluate": True}, {"evaluate": False, "eval_size": 3}, {"evaluate": False, "split": "a,b"}):
        with pytest.raises(UserError, match="--eval_dataset none"):
            read(path, tmp_path, streaming=streaming, eval_dataset="none", **options)


def test_copies_in_another_source_are_held_out_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "c.jsonl", *range(20))
    train, held_out = read(f"{path},{path}", tmp_path)
    assert len(held_out) == held_out.total() == 4 and set(train.values()) == {2} and len(train) == 16
    assert "c.jsonl: given more than once" in caplog.text


def test_a_large_set_is_read_to_its_end(tmp_path):
    train, held_out = read(write(tmp_path / "c.jsonl", *range(1500)), tmp_path, eval_size=100)
    assert len(train) == 1400 and len(held_out) == 100
