"""Generic text: what is read, cut and labelled."""

from __future__ import annotations

import json

import pytest
from helpers import make_tokenizer, write_conversations

from data import preview
from data.sets.generic import read_generic


def tokenizer_of(length: int):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


def read(path, length=16, **kwargs):
    return read_generic(str(path), tokenizer_of(length), data_cache_dir=str(path.parent / "cache"), **kwargs)


def test_a_text_file_is_one_document_whatever_its_lines_and_nothing_of_it_is_lost(tmp_path):
    path, text = tmp_path / "book.txt", "One line.\n\nAnother one, after a blank line.\n  the end"
    path.write_text(text)
    tokenizer, pieces = tokenizer_of(16), read(path)
    whole = tokenizer.backend_tokenizer.encode(text + tokenizer.eos_token, add_special_tokens=False).ids
    found = [token for piece in pieces for token in piece["input_ids"]]
    assert found[len(found) - len(whole) :] == whole and len(found) - len(whole) <= 1  # a BOS, if texts have one
    assert [piece["length"] for piece in pieces][:-1] == [16] * (len(pieces) - 1)
    for piece in pieces:
        assert piece["labels"] == [-100, *piece["input_ids"][1:]]


def test_texts_of_json_lines_are_documents_of_their_own(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 20}) + "\n" for letter in "ab"))
    tokenizer, pieces = tokenizer_of(16), read(path)
    ends = [i for i, piece in enumerate(pieces) if piece["input_ids"][-1] == tokenizer.eos_token_id]
    assert len(ends) == 2 and ends[-1] == len(pieces) - 1
    texts = [tokenizer.decode(piece["input_ids"], skip_special_tokens=True) for piece in pieces]
    assert "".join(texts[: ends[0] + 1]).strip() == "a" * 20 and "".join(texts[ends[0] + 1 :]).strip() == "b" * 20


def test_conversations_are_labelled_as_in_training_and_cut_rather_than_truncated(tmp_path):
    path = write_conversations(tmp_path / "chats.jsonl", 3)
    answers, everything = read(path, 12), read(path, 12, train_on="all")
    labelled = [sum(label != -100 for piece in pieces for label in piece["labels"]) for pieces in (answers, everything)]
    assert 0 < labelled[0] < labelled[1] and max(everything["length"]) == 12
    whole = read(path, 1000, train_on="all")
    assert sum(everything["length"]) == sum(whole["length"])


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.txt", b"", "empty file"),
        ("blank.txt", b"\n \n", "white space only"),
        ("latin.txt", b"caf\xe9 au lait\n", "not UTF-8"),
        ("binary.txt", b"a\0b", "binary file"),
        ("empty.jsonl", b"", "empty file"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl:1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_not_there_is_named_by_its_argument(tmp_path):
    with pytest.raises(ValueError, match="--distill_generic .*gone.txt.* is neither a known dataset nor an existing"):
        read(tmp_path / "gone.txt")


def test_the_preview_shows_the_pieces_and_what_of_them_is_learned(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("A line.\n\nAnother one.")
    common = ["--model_name_or_path", str(tmp_path / "model"), "--data_cache_dir", str(tmp_path / "cache")]
    preview.main([*common, "--distill_generic", str(tmp_path / "book.txt"), "--model_max_length", "12"])
    shown = capsys.readouterr().out
    assert "--- 1 of 2: 12 tokens, 11 of them learned ---" in shown and "\n\n" in shown.partition("⟦")[2]
