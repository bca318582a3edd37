"""Documents of the two local lm_eval tasks, from python-docs or from a text file of the user's.

python scripts/tasks/local_data.py FILE    # write the samples that no task holds out, as JSON Lines of {"text": ...}
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets

from data.bad_samples import BadSamplePolicy
from data.sets.selection import Chosen, collect, split_pools
from data.sources.readers import parse_sources
from qat.command_line import OneLineParser
from qat.errors import UserError, reported_in_one_line
from qat.files.paths import check_writable_file

HELD_OUT = 256  # samples that training on python-docs never sees, when its --eval_size is at most this
CHOICES = 4
_PASSAGE_CHARACTERS = 160
_DOCUMENT_CHARACTERS = 4000


def text(text: str | None = None, **_unused) -> dict[str, datasets.Dataset]:
    """Rows {"text"} of the file `text`, cut into documents at line ends; default: held-out python-docs answers.

    Raises:
        UserError: the file is missing, empty or no text.
    """
    documents = [answer for _, answer in _held_out()] if text is None else _cut(read_text(text))
    return {"test": datasets.Dataset.from_list([{"text": document} for document in documents])}


def read_text(path: str) -> str:
    """The text of the file of --text.

    Raises:
        UserError: it is missing, empty or no text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"--text {path!r} cannot be read ({error}); give a text file in UTF-8") from error
    if not content.strip():
        raise UserError(f"--text {path!r} is not a file, or is empty; give a text file in UTF-8")
    return content


def choices(**_unused) -> dict[str, datasets.Dataset]:
    """Rows {"question", "choices", "label"}: the beginning of the answer among those of three other questions."""
    samples, rng = _held_out(), random.Random(0)
    rows = []
    for index, (question, answer) in enumerate(samples):
        others = rng.sample([other for i, (_, other) in enumerate(samples) if i != index], CHOICES - 1)
        passages = [answer, *others]
        order = rng.sample(range(CHOICES), CHOICES)
        rows.append(
            {
                "question": question,
                "choices": [" ".join(passages[i].split())[:_PASSAGE_CHARACTERS] for i in order],
                "label": order.index(0),
            }
        )
    return {"test": datasets.Dataset.from_list(rows)}


def write_calibration(path: Path) -> None:
    """Write the conversations of python-docs that the tasks do not hold out to `path`."""
    training, _ = _split()
    lines = (json.dumps({"text": f"{question}\n{answer}"}) + "\n" for question, answer in training)
    path.write_text("".join(lines), encoding="utf-8")


def _held_out() -> list[tuple[str, str]]:
    return _split()[1]


@lru_cache(maxsize=1)
def _split() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions and answers of python-docs: those to learn from, and those held out."""
    policy = BadSamplePolicy("error")
    with TemporaryDirectory() as folder:
        pool = collect(parse_sources("python-docs")[0], "train", Path(folder, "rows"), policy)
        return tuple(map(_questions_and_answers, split_pools([pool], [None], 0, HELD_OUT, policy)))


def _questions_and_answers(chosen: Chosen) -> list[tuple[str, str]]:
    samples = [json.loads(row["sample"])["messages"] for row in chosen.rows()]
    return [(question["content"], answer["content"]) for question, answer in samples]


def _cut(text: str) -> list[str]:
    """Pieces of about `_DOCUMENT_CHARACTERS` characters that end with a line."""
    documents, current = [], ""
    for line in text.splitlines(keepends=True):
        current += line
        if len(current) >= _DOCUMENT_CHARACTERS:
            documents.append(current)
            current = ""
    return [*documents, current] if current.strip() else documents


def main(argv: list[str] | None = None) -> None:
    """Write the calibration samples; a wrong command line ends the program with one line."""
    parser = OneLineParser(description="Write calibration samples that the local tasks do not hold out.")
    parser.add_argument("file", type=Path, help='the JSON Lines file to write, rows of {"text": ...}')
    path = parser.parse_args(argv).file
    check_writable_file("FILE", path)
    write_calibration(path)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
