"""Which split a file of a folder belongs to, by the words that `datasets` finds in names of files and folders.

A word counts where it stands between separators, so `latest.jsonl` is no test. A file that is both, such as
`training_eval.jsonl`, is held out: what may be an evaluation set is never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

# See SPLIT_KEYWORDS in datasets/data_files.py.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_SEPARATOR = "[-._ 0-9]"
_WORD = re.compile(rf"(?:^|(?<={_SEPARATOR}))({'|'.join(SPLIT_OF)})(?:set)?(?={_SEPARATOR}|$)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b.*")


def words_of(name: str) -> list[str]:
    """The words in `name` that name a split, in lower case."""
    return [match.lower() for match in _WORD.findall(name)]


def is_for_training(split: str) -> bool:
    """Whether the name of a split is one of training samples: "train", "train_sft"."""
    words = words_of(split)
    return bool(words) and all(SPLIT_OF[word] == "train" for word in words)


def first_of(splits: Sequence[str], *kinds: str) -> str | None:
    """The first of `splits` that is named exactly by a word of the first of `kinds` ("validation") that has one."""
    return next((name for kind in kinds for word in WORDS[kind] for name in splits if name == word), None)


def assign_splits(files: Iterable[PurePath], requested: Sequence[str] = ()) -> dict[PurePath, str | None]:
    """The split of each file of a folder; None for files that name no split beside files that name "train".

    Args:
        files: paths within the folder.
        requested: names of splits that files may have besides those of `WORDS`, such as "train_sft".
    """
    files = list(files)
    exact = _named_shards(files, requested)
    splits = {file: exact.get(file) or _split_of(file, requested) for file in files}
    if any(split is not None and is_for_training(split) for split in splits.values()):
        return splits
    return {file: split or "train" for file, split in splits.items()}


def canonical(name: str, requested: Sequence[str] = ()) -> str:
    """ "validation" for "dev" and the like, unless "dev" is requested; other names stay."""
    return name if name in requested else SPLIT_OF.get(name, name)


def _named_shards(files: list[PurePath], requested: Sequence[str]) -> dict[PurePath, str]:
    """The hub's own layout: `data/NAME-00000-of-00002.parquet` belongs to the split NAME, if any NAME names a split."""
    shards = {f: m[1] for f in files if f.parts[:-1] == ("data",) and (m := _SHARD.fullmatch(f.name))}
    return {f: canonical(name, requested) for f, name in shards.items()} if any(map(words_of, shards.values())) else {}


def _split_of(file: PurePath, requested: Sequence[str]) -> str | None:
    parts = [file.name, *reversed(file.parts[:-1])]
    words = [word for part in parts for word in words_of(part)]
    held_out = [word for word in words if SPLIT_OF[word] != "train"]
    for name in sorted(requested, key=len, reverse=True):
        is_safe = not held_out or words_of(name)
        if name not in SPLIT_OF and is_safe and any(_contains(part, name) for part in parts):
            return name
    word = next(iter(held_out or words), None)
    return word and canonical(word, requested)


def _contains(part: str, name: str) -> bool:
    return re.search(rf"(?:^|{_SEPARATOR}){re.escape(name)}(?:{_SEPARATOR}|$)", part) is not None
