"""The cache: one builds, nobody gets another configuration's data, a crash leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

from chats import LLAMA3, SMOLLM2, make_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sets.cache import fingerprint
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
