"""Kinds of files, documents, and the limit that lines, rows and cells have."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT

from data.bad_samples import BadSample
from data.sources.arrow_sizes import row_bytes
from data.sources.files import MAX_LINE_BYTES, read_file

ROWS = [{"prompt": "q ü", "completion": f"a {i}"} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS))
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
CSV = "prompt,completion\r\n" + "".join(f"{row['prompt']},{row['completion']}\r\n" for row in ROWS)
OVERLONG = json.dumps({"prompt": 'a "{[' + "x" * MAX_LINE_BYTES, "completion": "b"})
ARRAY = json.dumps(ROWS)


def rows_of(path: Path) -> list[dict]:
    rows = [row for _, row in read_file(path)]
    assert not [row for row in rows if isinstance(row, BadSample)], rows[:3]
    return rows


def kinds_of(path: Path) -> list[str]:
    """What stands at each place: "row", or the kind of a bad sample."""
    return [row.kind if isinstance(row, BadSample) else "row" for _, row in read_file(path)]


FORMS = [
    ("lines.jsonl", LINES),
    ("lines.ndjson", LINES.replace("\n", "\r\n") + "\r\n"),
    ("lines.json", "\ufeff" + LINES),
    ("array.json", ARRAY),
    ("array.jsonl", ARRAY),
    ("array over lines.jsonl", json.dumps(ROWS, indent=1)),
    ("pretty.json", PRETTY),
    ("pretty.jsonl", "\ufeff" + PRETTY),
    ("data.json", json.dumps({"data": ROWS})),
    ("rows with others.json", json.dumps({"version": "1.1", "rows": ROWS, "features": [{"name": "x"}]}, indent=1)),
    ("any name.json", json.dumps({"my chats": ROWS})),
    ("array with 5,000 digits.json", ARRAY.replace('"a 0"', '"a 0", "id": ' + "9" * 5000)),
    ("table.csv", CSV),
    ("TABLE.CSV", "\ufeff" + CSV.replace("\r\n", "\n")),
    ("table.tsv", CSV.replace(",", "\t")),
]


@pytest.mark.parametrize("name,text", FORMS, ids=[name for name, _ in FORMS])
def test_every_form_of_a_text_file_gives_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    rows = rows_of(tmp_path / name)
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)):
        (tmp_path / f"{name}{suffix}").write_bytes(compress(text.encode()))
        assert rows_of(tmp_path / f"{name}{suffix}") == rows


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def test_a_conversation_that_stands_alone_in_a_file_is_one_row(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": turns}, {"messages": turns, "tools": [{"type": "function"}]}):
        (tmp_path / "c.json").write_text(json.dumps(row, indent=1))
        assert rows_of(tmp_path / "c.json") == [row]


@pytest.mark.parametrize("is_file_format", [False, True])
def test_arrow_files_of_both_formats_are_read(tmp_path, is_file_format):
    table = pa.Table.from_pylist(ROWS * 100)
    new = pa.ipc.new_file if is_file_format else pa.ipc.new_stream
    for compression in (None, "zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with new(str(tmp_path / "c.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
        assert rows_of(tmp_path / "c.arrow") == ROWS * 100


DAMAGED = [
    ("a.jsonl", f"{LINES}\n{OVERLONG}\n{LINES}", ["row"] * 3 + ["overlong line"] + ["row"] * 3),
    ("a.json", f"[{ARRAY[1:-1]},{OVERLONG},{ARRAY[1:-1]}]", ["row"] * 3 + ["overlong line"] + ["row"] * 3),
    ("a.csv", f'{CSV}"{"x" * MAX_LINE_BYTES}\n{CSV}', ["row"] * 3 + ["overlong line"] + ["row"] * 4),
    ("deep.json", f'[{json.dumps(ROWS[0])},{{"a":{"[" * 99999}{"]" * 99999}}},{json.dumps(ROWS[1])}]',
     ["row", "malformed JSON", "row"]),
    ("several.json", json.dumps({"train": ROWS, "test": ROWS}), ["several sets"]),
    ("cut.json", ARRAY[:-9], ["row", "row", "malformed JSON"]),
    ("more.json", ARRAY + ARRAY, ["row"] * 3 + ["malformed JSON"]),
    ("first line broken.jsonl", '{"messages": [\n' + LINES, ["malformed JSON"] + ["row"] * 3),
    ("lists.jsonl", '[{"role": "user"}]\n[{"role": "user"}]', ["wrong type"] * 2),
    ("twice.csv", "text,text\na,b\n", ["malformed CSV"]),
    ("utf16.csv", CSV.encode("utf-16"), ["not UTF-8"]),
    ("latin.json", ARRAY.replace("\\u00fc", "ü").encode("latin-1"), ["not UTF-8"]),
    ("cut.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], ["unreadable file"]),
    ("no.jsonl.gz", b"not compressed", ["unreadable file"]),
    ("no.jsonl.zst", b"not compressed", ["unreadable file"]),
    ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), ["unreadable file"]),
]  # fmt: skip


@pytest.mark.parametrize("name,content,kinds", DAMAGED, ids=[name for name, *_ in DAMAGED])  # gzip writes the time
def test_what_cannot_be_read_is_a_bad_sample_and_its_neighbours_are_rows(tmp_path, name, content, kinds):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert kinds_of(tmp_path / name) == kinds


# ---- Bombs ----


def dictionary(count: int, size: int) -> pa.DictionaryArray:
    """`count` references to one text of `size` bytes."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["a" * size]))


def turns(count: int, size: int) -> pa.ListArray:
    """One conversation of `count` turns that all are one text of `size` bytes."""
    roles = pa.array(["user", "assistant"] * (count // 2))
    values = pa.StructArray.from_arrays([roles, dictionary(count, size)], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), values)


def write_arrow(path: Path, column: pa.Array, compression: str | None = None) -> None:
    table = pa.table({"text": column})
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)


def write_parquet(path: Path, column: pa.Array, **options) -> None:
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 2**30, **options}
    pq.write_table(pa.table({"text": column}), path, **options)


BOMBS = {
    "rows that are one text.parquet": lambda p: write_parquet(p, dictionary(100, 20_000_000)),
    "turns that are one text.parquet": lambda p: write_parquet(p, turns(200, 20_000_000)),
    "turns of a smaller text.parquet": lambda p: write_parquet(p, turns(20_000, 200_000)),
    "a cell.parquet": lambda p: write_parquet(
        p, pa.array(["b" * 70_000_000, "c"]), use_dictionary=False, write_statistics=False
    ),
    "dictionary.arrow": lambda p: write_arrow(p, dictionary(300, 9_000_000)),
    "a cell.arrow": lambda p: write_arrow(p, pa.array(["b" * 70_000_000]), "zstd"),
    "a dictionary.arrow": lambda p: write_arrow(p, dictionary(3, 70_000_000), "lz4"),
    "turns.arrow": lambda p: write_arrow(p, turns(300, 9_000_000)),
    "zeros.jsonl.gz": lambda p: p.write_bytes(gzip.compress(b" " * 1_000_000) * 300),
    "a line.jsonl.zst": lambda p: p.write_bytes(zstd(b"x" * 300_000_000)),
}


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from data.bad_samples import BadSample
from data.sources.files import read_file
before, result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for name in sys.argv[1:]:
    start = time.process_time()
    kinds = {row.kind if isinstance(row, BadSample) else "row" for _, row in read_file(Path(name))}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10
    result[Path(name).name] = sorted(kinds), grown, time.process_time() - start
print(json.dumps(result))
"""


def test_no_bomb_takes_memory_or_time(tmp_path):
    """Files of kilobytes that stand for gigabytes, read by a process of its own."""
    for name, write in BOMBS.items():
        write(tmp_path / name)
    files = [str(tmp_path / name) for name in BOMBS]
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert {name: kinds for name, (kinds, *_) in result.items()} == {
        "rows that are one text.parquet": ["overlong line"],
        "turns that are one text.parquet": ["overlong line"],
        "turns of a smaller text.parquet": ["overlong line"],
        "a cell.parquet": ["unreadable Parquet"],
        "dictionary.arrow": ["overlong line"],
        "a cell.arrow": ["unreadable Arrow"],
        "a dictionary.arrow": ["unreadable Arrow"],
        "turns.arrow": ["overlong line"],
        "zeros.jsonl.gz": ["unreadable file"],
        "a line.jsonl.zst": ["unreadable file"],
    }
    assert max(grown for _, grown, _ in result.values()) < 300  # MiB
    assert max(seconds for *_, seconds in result.values()) < 20


def test_the_bytes_of_rows_are_those_of_their_values():
    texts = ["", "ab", None, "c" * 50]
    rows = [
        {"text": text, "turns": [{"role": "r", "content": text}] * number, "pair": [number, 1], "map": [("k", text)]}
        for number, text in enumerate(texts)
    ]
    turn = pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.large_string())])
    for text, many in ((pa.string(), pa.list_), (pa.string_view(), pa.list_view), (pa.large_string(), pa.large_list)):
        schema = {"text": text, "turns": many(turn), "pair": pa.list_(pa.int64(), 2), "map": pa.map_(text, text)}
        batch = pa.RecordBatch.from_pylist(rows, pa.schema(schema))
        lengths = [len(text or "") for text in texts]
        expected = [n + number * (1 + n) + 2 * 8 + 1 + n for number, n in enumerate(lengths)]
        assert row_bytes(batch).tolist() == expected
        assert row_bytes(batch.slice(1, 2)).tolist() == expected[1:3]
    runs = pa.RunEndEncodedArray.from_arrays([2, 5], ["a", "bb"])
    assert row_bytes(pa.record_batch({"x": runs}).slice(1, 3)).tolist() == [1, 2, 2]
