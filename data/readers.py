"""Where samples come from: three datasets by name, or a local file or folder of the same schemas.

Every reader returns conversations in one form, `{"conversations": [{"from": "User" | "Assistant" | "System", "value":
text}, ...]}`, so that formatting and labelling know one schema only.
"""

from __future__ import annotations

from pathlib import Path

import datasets

from .python_docs import read_python_docs

SPLIT_SEED = 42
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SCHEMAS = "Daring-Anteater's (`conversations`) or cnn_dailymail's (`article`, `highlights`)"

# name -> hub id, configuration, evaluation samples taken when `eval_size` is 0
_HUB = {
    "Daring-Anteater": ("nvidia/Daring-Anteater", None),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
}
_DEFAULT_EVAL_SIZE = {"Daring-Anteater": 2000, "cnn_dailymail": 2000, "python-docs": 256}
DATASET_NAMES = ("Daring-Anteater", "cnn_dailymail", "python-docs")


def read_splits(dataset: str, train_size: int = 0, eval_size: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and evaluation conversations, disjoint, shuffled with a fixed seed.

    A dataset that brings a validation split is evaluated on it; from any other, `eval_size` samples are held out.

    Args:
        dataset: one of `DATASET_NAMES`, or a local .jsonl, .json, .parquet or .csv file, or a folder of such files.
        train_size: training samples; 0 takes all that are left.
        eval_size: evaluation samples; 0 takes the dataset's default (at most a tenth of a local file).

    Raises:
        ValueError: unknown dataset, unknown columns, or more samples asked for than there are.
    """
    for argument, size in (("train_size", train_size), ("eval_size", eval_size)):
        if size < 0:
            raise ValueError(f"--{argument} {size} is negative; use 0 for the default or a number of samples")
    splits = _load(dataset)
    # Converted before splitting, so that a sample means the same in every schema.
    train = _to_conversations(splits["train"], dataset).shuffle(seed=SPLIT_SEED)
    if "validation" in splits:
        held_out = _to_conversations(splits["validation"], dataset).shuffle(seed=SPLIT_SEED)
        eval_size = eval_size or min(_DEFAULT_EVAL_SIZE.get(dataset, len(held_out)), len(held_out))
        _check_size("eval_size", eval_size, len(held_out), dataset)
    else:
        eval_size = eval_size or _DEFAULT_EVAL_SIZE.get(dataset) or max(1, len(train) // 10)
        _check_size("eval_size", eval_size, len(train) - 1, dataset)
        held_out = train.select(range(len(train) - eval_size, len(train)))
        train = train.select(range(len(train) - eval_size))
    _check_size("train_size", train_size, len(train), dataset)
    return train.select(range(train_size or len(train))), held_out.select(range(eval_size))


def _check_size(argument: str, size: int, available: int, dataset: str) -> None:
    if size > available:
        raise ValueError(f"--{argument} {size} is too many for {dataset}: {max(available, 0)} samples are available")


def _load(dataset: str) -> datasets.DatasetDict:
    if dataset == "python-docs":
        return datasets.DatasetDict(train=datasets.Dataset.from_list(read_python_docs()))
    if Path(dataset).exists():
        return _load_local(Path(dataset))
    if dataset not in _HUB:
        raise ValueError(
            f"--dataset {dataset!r} is neither a known dataset nor an existing path; choose one of "
            f"{', '.join(DATASET_NAMES)}, or a .jsonl, .json, .parquet or .csv file (or a folder of them) with "
            f"{_SCHEMAS} columns"
        )
    hub_id, configuration = _HUB[dataset]
    splits = datasets.load_dataset(hub_id, configuration)
    return datasets.DatasetDict({k: v for k, v in splits.items() if k in ("train", "validation")})


def _load_local(path: Path) -> datasets.DatasetDict:
    """A file is one training split; in a folder, files whose names begin with "validation" are the validation split."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _FILE_KINDS)
    kinds = {_FILE_KINDS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({p.suffix or p.name for p in files})) or "no data files"
        raise ValueError(f"--dataset {path}: found {found}; give files of one kind among {', '.join(_FILE_KINDS)}")
    held_out = [p for p in files if path.is_dir() and p.name.startswith("validation")]
    train = [p for p in files if p not in held_out and not (path.is_dir() and p.name.startswith("test"))]
    if not train:
        raise ValueError(f"--dataset {path}: the folder has validation files only; add training files")
    data_files = {"train": [str(p) for p in train]}
    if held_out:
        data_files["validation"] = [str(p) for p in held_out]
    return datasets.load_dataset(kinds.pop(), data_files=data_files)


def _to_conversations(split: datasets.Dataset, dataset: str) -> datasets.Dataset:
    if "conversations" in split.column_names:
        return split.select_columns([c for c in ("system", "conversations") if c in split.column_names])
    if {"article", "highlights"} <= set(split.column_names):
        return split.map(_summary_task, remove_columns=split.column_names)
    raise ValueError(f"--dataset {dataset}: columns {split.column_names} fit no known schema; known are {_SCHEMAS}")


def _summary_task(sample: dict) -> dict:
    request = {"from": "User", "value": f"Summarize the following article.\n\n{sample['article']}"}
    return {"conversations": [request, {"from": "Assistant", "value": sample["highlights"]}]}
