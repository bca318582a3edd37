"""Bad input: a clear error with file and line, or a skip that is counted; never a library's traceback."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import SMOLLM2, make_chat_tokenizer

from data.bad_samples import BadSample, BadSamplePolicy
from data.conversations.formatting import Formatter
from data.conversations.schemas import recognise
from data.sets.selection import collect
from data.sources.files import MAX_LINE_BYTES, read_file
from qat.errors import UserError
from utils import make_supervised_data_module

GOOD = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}


def chat(role="assistant", content="Yes.") -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi?"}, {"role": role, "content": content}]})


BAD_LINES = {
    "malformed JSON": '{"messages": [',
    "wrong type": '["messages"]',
    "empty turn": chat(content=" \n"),
    "unknown role": chat(role="robot"),
    "lone surrogate": '{"messages": [{"role": "assistant", "content": "a\\ud800b"}]}',
    "mixed schemas": '{"text": "of another kind"}',
    "no assistant turn": '{"messages": [{"role": "user", "content": "Hi?"}]}',
    "unsupported field": '{"messages": [{"role": "assistant", "content": "a", "x": 1}]}',
    "two system prompts": '{"system": "A", "messages": [{"role": "system", "content": "B"}]}',
}


def read(path: Path, tmp_path: Path, policy: str = "error") -> dict:
    tokenizer = make_chat_tokenizer(SMOLLM2, max_length=200)
    return make_supervised_data_module(
        str(path), tokenizer, eval_size=1, on_bad_sample=policy, data_cache_dir=str(tmp_path / "cache")
    )


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_with_its_file_or_counted_and_shown(tmp_path, caplog, kind):
    path = tmp_path / "c.jsonl"
    good = [chat(content=f"Yes {i}.") for i in range(5)]
    path.write_text("\n".join([*good[:2], BAD_LINES[kind], *good[2:]]) + "\n")
    with pytest.raises(ValueError, match=rf"c\.jsonl:3: {kind}.*\. Fix the data, or set --on_bad_sample skip"):
        read(path, tmp_path)
    module = read(path, tmp_path, "skip")
    assert len(module["train_dataset"]) + len(module["eval_dataset"]) == 5
    assert f"skipped 1 bad samples: 1 {kind}" in caplog.text and "c.jsonl:3" in caplog.text


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("e.jsonl", b"", "empty file"),
        ("e.json", b"[]", "empty file"),
        ("e.csv", b"text\n", "empty file"),
        ("b.txt", bytes(range(256)) * 9, "binary file"),
        ("b.jsonl", "ein wörter\n".encode("latin-1"), r"b.jsonl:1: not UTF-8: byte 0xf6"),
        ("p.parquet", b"PAR1 and then nothing", "unreadable Parquet"),
        ("d.jsonl", b"[" * 100_000, "malformed JSON"),
        ("n.jsonl", b"1" * 10_000, "malformed JSON|wrong type"),
        ("q.csv", b'text\n"never closed', "malformed CSV"),
        ("w.csv", b"text\na,b\n", "e?w.csv:2: malformed CSV: 2 fields, the header names 1"),
        ("j.json", b'[{"text": "a"},\n{"text": }]', r"j.json:2: malformed JSON"),
        ("o.jsonl", b'{"question": "a", "reply": "b"}', "'question', 'reply'.*no known schema"),
        ("l.jsonl", b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "l.jsonl:1: overlong line: 8.0 MiB"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_file_with_nothing_usable_is_an_error_under_either_policy(tmp_path, name, content, message, policy):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, tmp_path, policy)


def test_an_overlong_line_is_passed_over_without_losing_its_neighbours(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(b"first\n" + b"x" * 10_000_000 + b"\nlast\n")
    rows = [row for _, row in read_file(path)]
    assert rows[0] == {"text": "first"} and rows[2] == {"text": "last"} and rows[1].kind == "overlong line"


def test_samples_in_both_sets_are_an_error_or_leave_the_training_set_counted(tmp_path, caplog):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("\n".join(chat(content=f"{i}") for i in range(9)))
    held_out.write_text("\n".join(chat(content=f"{i}") for i in (3, 5, 77)))
    kwargs = {"eval_dataset": str(held_out), "data_cache_dir": str(tmp_path / "cache")}
    tokenizer = make_chat_tokenizer(SMOLLM2)
    with pytest.raises(ValueError, match=r"train\.jsonl:\d: duplicate of an evaluation sample: one of 2 training"):
        make_supervised_data_module(str(train), tokenizer, **kwargs)
    module = make_supervised_data_module(str(train), tokenizer, on_bad_sample="skip", **kwargs)
    assert len(module["train_dataset"]) == 7 and len(module["eval_dataset"]) == 3
    assert "2 duplicate of an evaluation sample" in caplog.text


def test_copies_within_a_set_never_straddle_training_and_evaluation(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(chat(content=f"{i // 2 if i < 10 else i}") for i in range(20)))
    module = make_supervised_data_module(
        str(path), make_chat_tokenizer(SMOLLM2), eval_size=8, data_cache_dir=str(tmp_path / "cache")
    )
    sets = [{tuple(s["input_ids"]) for s in module[name]} for name in ("train_dataset", "eval_dataset")]
    assert len(module["train_dataset"]) == 12 and len(sets[1]) == 8 and not sets[0] & sets[1]


# ---- Fuzz: thousands of damaged files ----

FILES_PER_KIND = 600
KINDS = [".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow", ".tsv", ".jsonl.gz"]
_ALIEN = [b"\0", b"\xff\xfe", b'"', b"{", b"}", b"[", b"]", b"\\ud800", b"\n", b",", b"1e999", b"null", b"\r"]


def _intact(kind: str, path: Path) -> bytes:
    rows = [json.loads(chat(content=f"Yes {i}.")) for i in range(6)]
    table = pa.Table.from_pylist(rows)
    if kind == ".parquet":
        pq.write_table(table, path)
        return path.read_bytes()
    if kind == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
        return path.read_bytes()
    if kind == ".jsonl.gz":
        return gzip.compress(_intact(".jsonl", path))
    return {
        ".tsv": "instruction\tinput\toutput\n" + "\n".join(f'"q, {i}"\t\t"a ""{i}"""' for i in range(6)),
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows, indent=1),
        ".csv": "instruction,input,output\n" + "\n".join(f'"q, {i}",,"a ""{i}"""' for i in range(6)),
        ".txt": "\n".join(f"line {i}" for i in range(6)),
    }[kind].encode()


def _damage(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        content = rng.choice(
            [
                lambda c, a=at, e=end: c[:a] + c[e:],  # lost
                lambda c, a=at: c[:a] + rng.choice(_ALIEN) + c[a:],  # inserted
                lambda c, a=at: c[:a] + bytes([rng.randrange(256)]) + c[a + 1 :],  # changed
                lambda c, a=at, e=end: c[:a] + c[a:e] * 2 + c[e:],  # repeated
            ]
        )(content)
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_file_ends_in_samples_counted_skips_or_a_clear_error(tmp_path, kind):
    """Nothing but UserError escapes, and every row is either a sample or counted."""
    rng, formatter = random.Random(kind), Formatter(make_chat_tokenizer(SMOLLM2), 200)
    path = tmp_path / f"c{kind}"
    intact = _intact(kind, path)
    outcomes = {"samples": 0, "skipped": 0, "refused": 0}
    for _ in range(FILES_PER_KIND):
        path.write_bytes(_damage(intact, rng))
        policy, rows = BadSamplePolicy("skip"), list(read_file(path))
        schema = next((recognise(row) for _, row in rows if isinstance(row, dict)), None)
        samples = []
        for _, row in rows:
            try:
                if isinstance(row, BadSample):
                    raise row
                if schema is None:
                    break
                samples.append(schema.sample_of(row))
            except BadSample as error:
                policy.handle(error)
        if schema is not None:
            assert len(samples) + policy.total == len(rows)
        for encoded in formatter.encode(samples):
            if isinstance(encoded, BadSample):
                policy.handle(encoded)
            else:
                outcomes["samples"] += 1
        outcomes["skipped"] += policy.total
        outcomes["refused"] += not samples
        assert not policy.total or re.search(r"skipped \d+ bad samples: \d+ \w+", policy.report())
    assert all(outcomes.values()), outcomes


def test_damaged_files_through_the_whole_path(tmp_path, caplog):
    """The same through make_supervised_data_module, under either policy, for fewer files."""
    rng = random.Random(0)
    ends = {"error": 0, "data": 0}
    tokenizer = make_chat_tokenizer(SMOLLM2, 200)
    for number in range(60):
        path = tmp_path / f"{number}{rng.choice(KINDS)}"
        path.write_bytes(_damage(_intact("".join(path.suffixes), path), rng))
        for policy in ("error", "skip"):
            try:
                make_supervised_data_module(
                    str(path), tokenizer, eval_size=1, on_bad_sample=policy, data_cache_dir=str(tmp_path / "cache")
                )
                ends["data"] += 1
            except UserError as error:
                ends["error"] += 1
                assert type(error) is UserError  # not a library's kind of it
                assert path.name in str(error) or "eval_size" in str(error), error
    assert min(ends.values()) > 10, ends


def test_every_row_of_a_split_is_kept_or_counted(tmp_path):
    from data.sources.readers import parse_sources

    path = tmp_path / "c.jsonl"
    path.write_text("\n".join([chat(), *BAD_LINES.values(), chat(content="z")]))
    policy = BadSamplePolicy("skip")
    [source] = parse_sources(str(path))
    pool = collect(source, "train", tmp_path / "raw", policy)
    assert len(pool) + policy.total == 2 + len(BAD_LINES) and policy.report().count("\n") == 3
