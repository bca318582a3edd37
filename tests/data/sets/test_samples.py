"""The schema of each part of a set, and of each row."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from data.bad_samples import BadSample, BadSamplePolicy
from data.conversations.schemas import PAIRS, SCHEMAS, recognise
from data.sets.samples import read_samples, survey
from data.sources.readers import parse_sources
from qat.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES, ALPACA = {"messages": TURNS}, {"instruction": "q", "output": "a"}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def read(*paths: Path, policy: str = "error") -> tuple[list[dict], list[str], BadSamplePolicy]:
    """Samples, notes and what was skipped."""
    parts = [part for path in paths for source in parse_sources(str(path)) for part in source.parts("train")]
    found, skipped = survey(parts), BadSamplePolicy(policy)
    return [json.loads(text) for _, text in read_samples(found.parts, skipped)], found.notes, skipped


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, **ALPACA},
        {"messages": [], "prompt": "q", "completion": "a"},
        {"conversations": None, "messages": TURNS},
        {"conversations": {"from": [], "value": []}, **MESSAGES},
        {"text": "", **MESSAGES},
        {"instruction": "q", "input": float("nan"), "output": "a"},
        {"conversations": TURNS},
        {"conversations": json.dumps(TURNS)},
        {"messages": SHAREGPT},
        {"dialog": TURNS},
        {"conversation": SHAREGPT},
        {"chat": TURNS},
        {"question": "q", "answer": "a", "id": 3},
        {"instruction": "q", "context": "", "response": "a"},
        {"system": None, "system_prompt": "", "query": "q", "response": "a"},
        *({request: "q", answer: "a"} for request, answer in PAIRS),
        {"prompt": TURNS[:1], "response": TURNS[1:]},
    ],
    ids=lambda row: ",".join(row),
)
def test_columns_without_values_are_absent_and_common_columns_are_known(row):
    assert recognise(row).sample_of(row) == MESSAGES


def test_a_context_and_a_system_prompt_find_their_place():
    row = {"instruction": "q", "context": "c", "response": "a", "system_prompt": "s"}
    system = {"role": "system", "content": "s"}
    assert recognise(row).sample_of(row) == {"messages": [system, {"role": "user", "content": "q\n\nc"}, TURNS[1]]}
    with pytest.raises(BadSample, match="system and system_prompt are both there"):
        recognise(row).sample_of({**row, "system": "other"})


@pytest.mark.parametrize("row", [{"question": None, "answer": "a"}, {"question": "q", "answer": ""}])
def test_half_of_a_pair_is_an_empty_turn(tmp_path, row):
    path = write(tmp_path / "c.jsonl", {"question": "q", "answer": "a"}, row)
    samples, _, skipped = read(path, policy="skip")
    assert samples == [MESSAGES] and skipped.counts == {"empty turn": 1}


def test_concatenated_tables_are_read_by_the_columns_that_their_rows_fill(tmp_path):
    first = datasets.Dataset.from_list([{**MESSAGES, "id": 1}] * 3)
    table = datasets.concatenate_datasets([first, datasets.Dataset.from_list([ALPACA] * 3)])
    table.to_parquet(tmp_path / "c.parquet")
    table.select([5, 0, 1]).save_to_disk(tmp_path / "d")  # begins with the other schema
    samples, _, policy = read(tmp_path / "c.parquet")
    assert samples == [MESSAGES] * 6 and policy.unread == {"id": 3}
    assert read(tmp_path / "c.parquet", tmp_path / "d")[0] == [MESSAGES] * 9
    table.to_csv(tmp_path / "c.csv")
    with pytest.raises(UserError, match="c.csv.*: wrong type"):  # a CSV cell holds Python's form, not JSON
        read(tmp_path / "c.csv")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_two_schemas_by_file_are_refused_with_both_names(tmp_path, policy):
    a, b = write(tmp_path / "a.jsonl", MESSAGES), write(tmp_path / "b.jsonl", ALPACA, ALPACA)
    with pytest.raises(UserError, match=r"two schemas.*a\.jsonl has OpenAI `messages`.*b\.jsonl has Alpaca.*comma"):
        read(a, b, policy=policy)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:1: columns \['step'\] fit no known schema"):
        read(a, tmp_path / "log.jsonl", policy=policy)


def test_a_row_of_another_schema_is_a_bad_sample_wherever_it_stands(tmp_path):
    for rows in ([MESSAGES, ALPACA, MESSAGES], [{"step": 1}, MESSAGES, MESSAGES], [ALPACA, MESSAGES, MESSAGES]):
        samples, _, skipped = read(write(tmp_path / "c.jsonl", *rows), policy="skip")
        assert samples == [MESSAGES] * 2 and skipped.counts == {"mixed schemas": 1}


def test_preferences_are_refused_by_name():
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": TURNS, "rejected": TURNS}):
        assert recognise(row) is None


@pytest.mark.parametrize(
    "row,message",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference set.*write the chosen one"),
        ({"prompt": "q", "completion": "a", "label": False}, "`label` says which completions are wanted"),
    ],
)
def test_sets_of_preferences_are_refused_with_the_remedy(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "c.jsonl", row), policy="skip")


def test_what_is_not_read_is_named(tmp_path):
    row = {"id": 1, "text": "q a", "source": None, **MESSAGES}
    samples, notes, policy = read(write(tmp_path / "c.jsonl", row))
    assert policy.unread == {"id": 1, "text": 1}
    assert samples == [MESSAGES] and notes == [
        "schema OpenAI `messages` (`role`, `content`)",
        "rows fill the columns of OpenAI `messages` (`role`, `content`) and of plain `text`, all of it learned; the "
        "former is read",
    ]
    assert not any("fill" in note for note in read(write(tmp_path / "a.jsonl", {**ALPACA, "input": "x"}))[1])


def test_no_schema_hides_another():
    """Each schema is found by its own columns, so none is out of reach."""
    for schema in SCHEMAS:
        assert recognise(dict.fromkeys(schema.required, "x")) is schema
