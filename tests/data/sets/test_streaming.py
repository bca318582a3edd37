"""Streams: splits, schemas and metadata as without them, and the order."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers import make_tokenizer

from qat.errors import UserError
from utils import make_supervised_data_module


def write(path: Path, mark: str, count: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{mark} {i}?", "completion": f"{mark}{i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def stream(spec: Path, **options) -> tuple[list[str], list[str]]:
    """The texts of the training and the evaluation samples, in their order."""
    tokenizer = make_tokenizer()
    module = make_supervised_data_module(str(spec), tokenizer, streaming=True, **options)
    sets = (module["train_dataset"], module["eval_dataset"])
    return tuple([tokenizer.decode(sample["input_ids"]) for sample in samples] for samples in sets)


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train/0", "dev/0", "eval/0")])
def test_a_stream_is_of_one_split_alone(tmp_path, names, caplog):
    caplog.set_level(logging.INFO)
    for name in names:
        write(tmp_path / "set" / f"{name}.jsonl", name[0])
    for name, text in (("LICENSE.txt", "You may."), ("about.json", '{"a": 1}'), ("dataset_infos.json", "{}")):
        (tmp_path / "set" / name).write_text(text)
    train, held_out = stream(tmp_path / "set")
    assert {text[3] for text in train} == {"t"} and {text[3] for text in held_out} == {names[1][0]}
    assert len(train) == len(held_out) == 12
    assert f"test: {names[2]}.jsonl" in caplog.text and "LICENSE.txt, dataset_infos.json (not data)" in caplog.text


def test_files_of_two_schemas_are_refused_and_rows_read_by_what_they_fill(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_text('{"text": "of another kind"}')
    with pytest.raises(UserError, match=r"two schemas.*a\.jsonl.*b\.jsonl"):
        stream(tmp_path, on_bad_sample="skip")
    rows = [{"prompt": None, "completion": None, "text": f"t{i}"} for i in range(12)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held_out = stream(tmp_path)
    assert sum("t" in text for text in train + held_out) == 12 and len(train + held_out) == 24


def test_the_seed_is_that_of_the_order_and_not_of_what_is_held_out(tmp_path):
    path = write(tmp_path / "c.jsonl", "c", 60)
    runs = [stream(path, seed=seed, eval_size=5) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]
    assert sorted(runs[0][0]) == sorted(runs[2][0]) and runs[0][1] == runs[2][1]


def test_a_small_stream_keeps_samples_to_train_on(tmp_path):
    train, held_out = stream(write(tmp_path / "c.jsonl", "c", 20))
    assert (len(train), len(held_out)) == (18, 2)
