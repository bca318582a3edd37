"""The cache: one builds, nobody gets another configuration's data, a crash leaves nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from chats import LLAMA3, SMOLLM2, make_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sets.cache import build_once, fingerprint
from utils import make_supervised_data_module


def _write(path: Path, answers: list[str]) -> None:
    turns = ([{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers))
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "answer": st.sampled_from(["one", "two"]),
        "template": st.sampled_from([SMOLLM2, LLAMA3]),
        "max_length": st.sampled_from([60, 4096]),
        "train_on": st.sampled_from(["assistant", "all"]),
        "chat_template": st.sampled_from([None, "none"]),
        "train_size": st.sampled_from([0, 2, 0.5]),
    }
)


def test_the_cache_never_returns_another_configurations_data(tmp_path):
    """One shared cache against an empty one each: whatever the order of configurations, the data are the same."""
    count = iter(range(10**6))
    path = tmp_path / "c.jsonl"

    def build(configuration: dict, cache: Path) -> list[list]:
        c = dict(configuration)
        answer = c.pop("answer")
        _write(path, [f"{answer} {i}" for i in range(6)])  # the same name and size, other content
        tokenizer = make_chat_tokenizer(c.pop("template"), c.pop("max_length"))
        module = make_supervised_data_module(str(path), tokenizer, eval_size=1, data_cache_dir=str(cache), **c)
        return [list(module[name]) for name in ("train_dataset", "eval_dataset")]

    @settings(max_examples=25, deadline=None)
    @given(CONFIGURATIONS)
    def check(configuration):
        assert build(configuration, tmp_path / "shared") == build(configuration, tmp_path / f"own{next(count)}")

    check()
    assert sum(p.is_dir() for p in (tmp_path / "shared").iterdir()) > 5


def test_a_second_run_reads_the_cache_and_repeats_what_was_skipped(tmp_path, caplog, monkeypatch):
    _write(tmp_path / "c.jsonl", ["a", "b", "", "d"])
    kwargs = {"eval_size": 1, "on_bad_sample": "skip", "data_cache_dir": str(tmp_path / "cache")}
    first = make_supervised_data_module(str(tmp_path / "c.jsonl"), make_chat_tokenizer(SMOLLM2), **kwargs)
    caplog.clear()
    monkeypatch.setattr("data.supervised._build_sets", None)  # to build again would fail
    second = make_supervised_data_module(str(tmp_path / "c.jsonl"), make_chat_tokenizer(SMOLLM2), **kwargs)
    assert list(first["train_dataset"]) == list(second["train_dataset"])
    assert "skipped 1 bad samples: 1 empty turn" in caplog.text


def test_fingerprints_change_with_any_value_and_not_with_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def _build_slowly(folder: Path) -> None:
    time.sleep(0.3)
    with (folder.parent / "builds").open("a") as log:
        log.write("x")
    (folder / "data").write_text("whole")


def _build_from_a_process(root: Path) -> None:
    assert (build_once(root, "key", _build_slowly) / "data").read_text() == "whole"


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_from_a_process, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "x"


def _die(folder: Path) -> None:
    (folder / "data").write_text("half")
    os._exit(9)  # as if killed: nothing is cleaned up, and the lock is the operating system's to free


def test_a_crash_leaves_no_half_cache_and_the_next_builds_anew(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=build_once, args=(tmp_path, "key", _die))
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / "key").exists() and list(tmp_path.glob("key.partial-*"))
    _build_from_a_process(tmp_path)
    assert not list(tmp_path.glob("key.partial-*"))


def test_a_failed_build_leaves_nothing_and_its_error_is_seen(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        build_once(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_where_another_machine_was_first_its_folder_is_taken(tmp_path):
    def build(folder: Path) -> None:
        (folder / "data").write_text("ours")
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "data").write_text("theirs")

    assert (build_once(tmp_path, "key", build) / "data").read_text() == "theirs"
    assert not list(tmp_path.glob("key.partial-*"))
