"""Splits by the names that `datasets` uses; it is the oracle."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from data.sources.splits import assign_splits, words_of

# Folders in which every file names a split; `datasets` and this package have to agree on each of them.
LAYOUTS = [
    ["train.jsonl", "valid.jsonl", "test.jsonl"],
    ["train.jsonl", "dev.jsonl", "eval.jsonl"],
    ["training.jsonl", "val.jsonl", "evaluation.jsonl"],
    ["my_train_file_0.jsonl", "my_testing_file_0.jsonl", "x-validation.jsonl"],
    ["train/0.jsonl", "test/0.jsonl", "validation/0.jsonl"],
    ["my-train-data/x.jsonl", "dev.set 2/x.jsonl"],
    ["deep/er/train/a.jsonl", "deep/er/eval/a.jsonl"],
    ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    ["data/train_sft-00000-of-00002.parquet", "data/test_gen-00000-of-00001.parquet"],
    ["latest.jsonl", "contest.jsonl", "devices.jsonl"],
    ["train.jsonl", "latest.jsonl", "dev.jsonl"],
    ["train.v2.jsonl", "test.v2.jsonl"],
    ["archive/train.jsonl", "train.jsonl", "archive/test.jsonl"],
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_the_splits_of_a_folder_are_those_of_datasets(tmp_path, layout):
    root = tmp_path / "a test of things"  # words outside of the folder do not count
    for name in layout:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    found = DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root))
    expected = {str(PurePath(file).relative_to(root)): str(split) for split, files in found.items() for file in files}
    splits = assign_splits([PurePath(name) for name in layout])
    assert {str(file): split for file, split in splits.items() if split is not None} == expected


@pytest.mark.parametrize(
    "file,requested,split",
    [
        ("training_eval.jsonl", (), "test"),  # `datasets` puts it into both
        ("train/dev.jsonl", (), "validation"),
        ("test/train_0.jsonl", (), "test"),
        ("TRAIN.JSONL", (), "train"),
        ("Dev.jsonl", (), "validation"),
        ("devset.jsonl", (), "validation"),
        ("notes.jsonl", (), None),
        ("train_sft.jsonl", ("train_sft", "test_sft"), "train_sft"),
        ("test_sft.jsonl", ("sft",), "test"),
        ("chat_sft.jsonl", ("sft",), "sft"),
        ("dev.jsonl", ("train", "dev"), "dev"),
        ("train_sft.jsonl", ("train",), "train"),
    ],
)
def test_what_may_be_held_out_is_never_trained_on(file, requested, split):
    files = [PurePath(file), PurePath("train/0.jsonl")]
    assert assign_splits(files, requested)[files[0]] == split


def test_a_word_counts_between_separators_only():
    assert words_of("train-eval_dev.test 0") == ["train", "eval", "dev", "test"]
    assert not any(map(words_of, ("latest", "contest", "trainer", "evaluate", "invalid", "developer", "tests")))


def test_files_without_a_split_are_trained_on_if_no_file_names_train():
    files = [Path("chats.jsonl"), Path("test.jsonl")]
    assert assign_splits(files) == {files[0]: "train", files[1]: "test"}
