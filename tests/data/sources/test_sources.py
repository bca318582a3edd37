"""Datasets by name, file and folder: schemas, splits, weights, sizes, streaming, and the preview."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import SMOLLM2, make_chat_tokenizer
from helpers import make_llama, make_tokenizer

from data import preview
from data.conversations.schemas import recognise
from data.sets.summary import padding_fraction
from data.sources.readers import parse_sources
from utils import make_supervised_data_module

USER, ANSWER = "Sum 1 and 2.", "3"
EXCHANGE = {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]}
ROWS = {
    "conversations": {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}], "id": 7},
    "messages": {"messages": [{"role": "user", "content": USER}, {"role": "Assistant", "content": ANSWER}], "id": 7},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": USER}]}, EXCHANGE["messages"][1]]},
    "columns": {"conversations": {"from": ["User", "Assistant"], "value": [USER, ANSWER]}},
    "prompt": {"prompt": USER, "completion": ANSWER},
    "prompt turns": {"prompt": EXCHANGE["messages"][:1], "completion": EXCHANGE["messages"][1:]},
    "alpaca": {"instruction": USER, "input": "", "output": ANSWER},
    "alpaca without input": {"instruction": USER, "output": ANSWER},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_schema_becomes_the_same_conversation(name):
    assert recognise(ROWS[name]).sample_of(ROWS[name]) == EXCHANGE


def test_inputs_system_prompts_and_articles_find_their_place():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert recognise(row).sample_of(row)["messages"][0]["content"] == "Add.\n\n1 2"
    row = {"system": "Be brief.", "conversations": ROWS["conversations"]["conversations"]}
    system = {"role": "system", "content": "Be brief."}
    assert recognise(row).sample_of(row)["messages"] == [system, *EXCHANGE["messages"]]
    row = {"article": "Long.", "highlights": "Short."}
    assert recognise(row).sample_of(row)["messages"][0]["content"].endswith("\n\nLong.")
    assert recognise({"text": "x"}).sample_of({"text": "x"}) == {"text": "x"} and recognise({"reply"}) is None


def write(path: Path, count: int, mark: str) -> Path:
    rows = [{"instruction": f"{mark} {i}?", "input": "", "output": f"{mark}{i}"} for i in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{mark}{i}\n\n" for i in range(count)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(spec: str, tmp_path: Path, *sizes: float, **kwargs) -> tuple[Counter, Counter]:
    """How many samples of each mark (their answers' first letter) the two sets have."""
    tokenizer = make_tokenizer()
    module = make_supervised_data_module(spec, tokenizer, *sizes, data_cache_dir=str(tmp_path / "cache"), **kwargs)
    texts = [[tokenizer.decode(s["input_ids"]) for s in module[name]] for name in ("train_dataset", "eval_dataset")]
    return tuple(Counter(text.removeprefix("<s>")[0] for text in half) for half in texts)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_every_kind_of_file_is_read(tmp_path, kind):
    path = write(tmp_path / f"c{kind}", 10, "a")
    assert read(str(path), tmp_path, 0, 3) == ({"a": 7}, {"a": 3})


def test_weights_mix_without_repeating_and_sizes_may_be_shares(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 100, "a"), write(tmp_path / "b.csv", 40, "b")
    assert read(f"{a}:0.7,{b}:0.3", tmp_path, 0, 10) == ({"a": 86, "b": 37}, {"a": 7, "b": 3})
    assert read(f"{a}:3,{b}:1", tmp_path, 20, 4) == ({"a": 15, "b": 5}, {"a": 3, "b": 1})
    assert read(f"{a},{b}", tmp_path, 0, 14) == ({"a": 90, "b": 36}, {"a": 10, "b": 4})
    assert read(str(a), tmp_path, 0.5, 0.2) == ({"a": 40}, {"a": 20})
    with pytest.raises(ValueError, match="--train_size 200 .*none repeated.* 123 samples"):
        read(f"{a}:0.7,{b}:0.3", tmp_path, 200, 10)
    with pytest.raises(ValueError, match="weights to some"):
        parse_sources(f"{a}:0.7,{b}")
    with pytest.raises(ValueError, match="-1.* not a positive number"):
        parse_sources(f"{a}:-1")


def test_splits_are_chosen_by_name_and_by_rule(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, mark, count in (("train", "t", 9), ("validation", "v", 3), ("test", "e", 2), ("extra_sft", "x", 5)):
        write(folder / f"{name}.jsonl", count, mark)
    spec = str(folder)
    assert read(spec, tmp_path) == ({"t": 9}, {"v": 3})
    assert read(spec, tmp_path, 0, 2, split="extra_sft") == ({"x": 3}, {"x": 2})
    assert read(spec, tmp_path, split="extra_sft,test") == ({"x": 5}, {"e": 2})
    assert read(spec, tmp_path, eval_dataset=str(folder / "test.jsonl")) == ({"t": 9}, {"e": 2})
    with pytest.raises(ValueError, match="--split 'nope'.*train, test, validation"):
        read(spec, tmp_path, split="nope")


def test_several_processes_give_what_one_gives_in_the_same_order(tmp_path):
    path = write(tmp_path / "a.jsonl", 700, "a")
    sets = [
        make_supervised_data_module(
            str(path), make_tokenizer(), preprocessing_num_workers=n, data_cache_dir=str(tmp_path / f"cache{n}")
        )["train_dataset"]
        for n in (1, 3)
    ]
    assert list(sets[0]) == list(sets[1])


def test_a_stream_has_the_samples_of_the_set_but_those_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", 50, "a")
    kwargs = {"eval_size": 5, "data_cache_dir": str(tmp_path / "cache")}
    stream = make_supervised_data_module(str(path), make_tokenizer(), streaming=True, **kwargs)
    whole = make_supervised_data_module(str(path), make_tokenizer(), **kwargs)
    everything = {tuple(s["input_ids"]) for name in ("train_dataset", "eval_dataset") for s in whole[name]}
    parts = [[tuple(s["input_ids"]) for s in stream[name]] for name in ("train_dataset", "eval_dataset")]
    assert [len(part) for part in parts] == [45, 5] and set(parts[0]) | set(parts[1]) == everything
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    model = make_llama()
    model.config.use_cache = False
    packed = make_supervised_data_module(str(path), tokenizer, streaming=True, packing=True, model=model, **kwargs)
    rows = list(packed["train_dataset"])
    assert sum(len(row["input_ids"]) for row in rows) == sum(map(len, parts[0]))
    assert sum(row["position_ids"].count(0) for row in rows) == 45 and all(len(r["input_ids"]) <= 64 for r in rows)


def test_a_stream_skips_aloud_and_mixes_by_weight(tmp_path, caplog):
    a, b = write(tmp_path / "a.jsonl", 300, "a"), write(tmp_path / "b.jsonl", 300, "b")
    with b.open("a") as file:
        file.write("\n{broken\n")
    stream = make_supervised_data_module(
        f"{a}:0.8,{b}:0.2", make_tokenizer(), streaming=True, on_bad_sample="skip", train_size=200, eval_size=2
    )
    tokenizer = make_tokenizer()
    marks = Counter(tokenizer.decode(s["input_ids"]).removeprefix("<s>")[0] for s in stream["train_dataset"])
    assert sum(marks.values()) == 200 and 140 <= marks["a"] <= 180
    alone = make_supervised_data_module(str(b), make_tokenizer(), streaming=True, on_bad_sample="skip", eval_size=2)
    assert len(list(alone["train_dataset"])) == 298 and "b.jsonl:301: malformed JSON" in caplog.text
    with pytest.raises(ValueError, match="--train_size 0.5: a stream"):
        make_supervised_data_module(str(a), make_tokenizer(), 0.5, streaming=True)


def test_padding_fraction_is_what_is_not_a_token():
    assert padding_fraction([1, 3], 2) == pytest.approx(2 / 6) and padding_fraction([4, 4, 4], 2) == 0


def test_the_preview_marks_exactly_what_is_learned(tmp_path, capsys):
    tokenizer = make_chat_tokenizer(SMOLLM2)
    tokenizer.save_pretrained(tmp_path / "m")
    path = write(tmp_path / "c.jsonl", 4, "a")
    arguments = [
        "--model_name_or_path", str(tmp_path / "m"), "--dataset", str(path), "--data_cache_dir", str(tmp_path / "cache")
    ]  # fmt: skip
    preview.main([*arguments, "--count", "1"])
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦a" in shown and shown.count("⟦") == shown.count("<|im_end|>⟧") == 1
    preview.main([*arguments, "--packing", "True", "--color", "always"])
    assert capsys.readouterr().out.count("next sample in this row") == 2


# ---- The hub, which tests do not reach: `datasets.load_dataset` is a double ----


def rows_of(*letters: str) -> datasets.Dataset:
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": letter * 3}] for letter in letters]
    return datasets.Dataset.from_dict({"messages": turns})


def test_a_hub_id_is_loaded_with_its_configuration_and_evaluated_on_its_validation(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"test": rows_of("e"), "train": rows_of(*"abcd"), "validation": rows_of("v", "w")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held_out = read("someone/chats@small", tmp_path)
    assert sum(train.values()) == 4 and sum(held_out.values()) == 2
    assert asked[0] == (("someone/chats", "small"), {"streaming": False})


@pytest.mark.parametrize(
    ("name", "hub_id", "configuration"),
    [("Daring-Anteater", "nvidia/Daring-Anteater", None), ("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0")],
)
def test_named_sets_are_hub_ids(monkeypatch, name, hub_id, configuration):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": args})
    [source] = parse_sources(name)
    assert source._splits["train"] == (hub_id, configuration)


def test_a_hub_set_that_cannot_be_loaded_or_breaks_off_is_named(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ValueError, match="'someone/chats'.*cannot reach the hub.*python-docs needs no network"):
        parse_sources("someone/chats")

    def breaks_off():
        yield from rows_of(*"abc")
        raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": breaks_off()})
    with pytest.raises(ValueError, match=r"someone/chats/train\[3\]: unreadable row: OSError: connection lost"):
        read("someone/chats", tmp_path, 0, 1)
