"""Which files of a folder are data: everything else in it is passed over by name."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sets.samples import survey
from data.sources.readers import parse_sources
from qat.errors import UserError

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/a-*
  - split: dev
    path: [main/b.jsonl]
- config_name: other
  data_dir: other
---
"""


def rows_of(mark: str, count: int = 3) -> list[dict]:
    return [{"prompt": f"{mark} {i}?", "completion": f"{mark}{i}"} for i in range(count)]


def write(path: Path, mark: str = "a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows_of(mark)), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows_of(mark))))
    return path


def splits_of(spec: str | Path, *requested: str) -> dict[str, str]:
    """The marks of each split's rows, in their order."""
    [source] = parse_sources(str(spec), requested=requested)
    marks = {}
    for split in source.splits():
        rows = [row for part, _ in survey(source.parts(split)).parts for _, row in part.rows()]
        marks[split] = "".join(dict.fromkeys(row["completion"][0] for row in rows))
    return marks


def report_of(spec: str | Path) -> str:
    [source] = parse_sources(str(spec))
    return "\n".join([*source.report(), *survey(source.parts("train")).notes])


def test_a_clone_of_a_hub_set_is_its_data_and_the_rest_is_named(tmp_path):
    write(tmp_path / "data/train-00000-of-00001.parquet", "t")
    write(tmp_path / "data/test-00000-of-00001.parquet", "e")
    write(tmp_path / ".cache/train.jsonl", "h")
    passed_over = ["README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", "notes.txt", "generation.log", "x.pkl"]
    for name in passed_over:
        (tmp_path / name).write_text('{"features": {}}' if name.endswith("json") else "You may copy it.\n" * 20)
    assert splits_of(f"{tmp_path}/") == {"train": "t", "test": "e"}
    assert all(name in report_of(tmp_path) for name in passed_over)
    assert "test: data/test-00000-of-00001.parquet" in report_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    ['{"name": "chats", "size": 3}', '{\n "a": 1,\n "authors": [{"name": "x"}]\n}', '{"splits": [{"name": "train"}]}'],
)
def test_a_json_file_of_one_object_beside_data_describes_them(tmp_path, content):
    write(tmp_path / "chats.jsonl", "c")
    (tmp_path / "about.json").write_text(content)
    assert splits_of(tmp_path) == {"train": "c"}
    assert "about.json: one object, and no sample" in report_of(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps(rows_of("d")[0], indent=1))
    assert splits_of(tmp_path) == {"train": "dc"}


def test_folders_of_save_to_disk_are_read_by_their_state(tmp_path):
    chats = {mark: datasets.Dataset.from_list(rows_of(mark)) for mark in "tvc"}
    datasets.DatasetDict({"train": chats["t"], "validation": chats["v"]}).save_to_disk(tmp_path / "dict")
    chats["c"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"completion": "stale"})  # leaves cache-*.arrow there
    assert splits_of(tmp_path / "dict") == {"train": "t", "validation": "v"}
    assert splits_of(tmp_path / "one") == {"train": "c"} and "cache-" in report_of(tmp_path / "one")
    datasets.DatasetDict({"train_sft": chats["t"]}).save_to_disk(tmp_path / "named")
    assert splits_of(tmp_path / "named") == {"train_sft": "t"}
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="data-00001-of-00002.arrow: state.json names it, and it is not there"):
        parse_sources(str(tmp_path / "one"))


def test_links_upper_case_and_compressed_names_are_read_and_nothing_twice(tmp_path):
    write(tmp_path / "real/x.jsonl", "l")
    write(tmp_path / "set/TRAIN.JSONL", "u")
    (tmp_path / "set/train_link.jsonl").symlink_to(tmp_path / "set/TRAIN.JSONL")
    (tmp_path / "set/train_folder").symlink_to(tmp_path / "real")
    (tmp_path / "set/round").symlink_to(tmp_path / "set")
    (tmp_path / "set/train.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "z.jsonl", "z").read_bytes()))
    os.mkfifo(tmp_path / "set/train.csv")
    assert splits_of(tmp_path / "set") == {"train": "uzl"}
    assert "train_link.jsonl (a link to" in report_of(tmp_path / "set")
    (tmp_path / "set/train_gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="train_gone.jsonl cannot be read: No such file"):
        parse_sources(str(tmp_path / "set"))[0].identity("train")


def test_the_configurations_of_a_card_are_taken_as_the_hub_takes_them(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    for name, mark in (("main/a-0", "t"), ("main/b", "v"), ("other/train", "o"), ("other/test", "e"), ("train", "x")):
        write(tmp_path / f"{name}.jsonl", mark)
    assert splits_of(f"{tmp_path}@main") == {"train": "t", "validation": "v"}
    assert splits_of(f"{tmp_path}@other") == {"train": "o", "test": "e"}
    with pytest.raises(UserError, match=r"declares main, other; choose one: .*@main"):
        parse_sources(str(tmp_path))
    (tmp_path / "README.md").write_text(CARD.replace("name: other", "name: default"))
    assert splits_of(tmp_path) == {"train": "o", "test": "e"}


def test_patterns_commas_colons_and_homes_name_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a, b:c"
    for name in ("train-0", "train-1", "test-0"):
        write(folder / f"{name}.jsonl", name[0] + name[-1])
    write(tmp_path / "d.jsonl", "d")
    assert splits_of(folder / "*.jsonl") == {"train": "t", "test": "t"}
    assert splits_of("~/d.jsonl") == {"train": "d"}
    sources = parse_sources(f"{folder}:0.5,{tmp_path}/d.jsonl:2")
    assert [(source.name, source.weight) for source in sources] == [(str(folder), 0.5), (f"{tmp_path}/d.jsonl", 2)]
    for wrong in (f"{tmp_path}/*.csv", f"{tmp_path}/**/x*.jsonl"):
        with pytest.raises(UserError, match="--dataset .*: found nothing; give files among"):
            parse_sources(wrong)
    with pytest.raises(UserError, match="known are"):
        parse_sources("x" * 5000 + ".jsonl")


def test_a_folder_without_data_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("You may.")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"found LICENSE.txt \(not data\); model.bin \(of no known kind\); give files"):
        parse_sources(str(tmp_path))
    write(tmp_path / "dev.jsonl")
    assert splits_of(tmp_path / "dev.jsonl") == {"train": "a"}
    assert "taken as it is" in report_of(tmp_path / "dev.jsonl")
