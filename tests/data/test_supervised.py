"""Reading, formatting, labelling and batching of supervised data."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_tokenizer, write_conversations

from data.conversations.formatting import IGNORE_INDEX, encode_conversation
from data.sources.python_docs import read_python_docs
from utils import make_supervised_data_module

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def labelled_text(encoded: dict, tokenizer) -> list[str]:
    """The runs of labelled tokens, decoded."""
    runs, current = [], []
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        if label == IGNORE_INDEX:
            runs, current = runs + [current] * bool(current), []
        else:
            assert label == token
            current.append(token)
    return [tokenizer.decode(run) for run in runs + [current] * bool(current)]


def two_turns() -> dict:
    turns = [("User", "Hi?"), ("Assistant", "Hello."), ("User", "Bye?"), ("Assistant", "Bye.")]
    return {"system": "Be brief.", "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_exactly_the_answers_and_their_end_of_sequence_are_labelled(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    encoded = encode_conversation(two_turns(), tokenizer, max_length=1000)
    assert labelled_text(encoded, tokenizer) == ["Hello.</s>", "Bye.</s>"]


def test_a_template_that_depends_on_later_turns_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="chat template renders a turn differently"):
        encode_conversation(two_turns(), tokenizer, 1000)


def test_an_unknown_role_is_refused_by_name():
    with pytest.raises(ValueError, match="'Robot'"):
        encode_conversation({"conversations": [{"from": "Robot", "value": "x"}]}, make_tokenizer(), 10)


def test_batches_are_padded_to_their_longest_sample_without_labels_or_attention(tmp_path):
    path = str(write_conversations(tmp_path / "c.jsonl"))
    module = make_supervised_data_module(path, make_tokenizer(), eval_size=5, data_cache_dir=str(tmp_path / "cache"))
    samples = [module["train_dataset"][0], module["train_dataset"][1]]
    samples[0] = {name: samples[0][name][:10] for name in ("input_ids", "labels")}
    batch = module["data_collator"](samples)
    longest = len(samples[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    assert (batch["labels"][0, 10:] == IGNORE_INDEX).all()
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([10, longest]))


def texts_of(samples) -> list[str]:
    """What each sample says, by a tokenizer of single bytes."""
    tokenizer = make_tokenizer()
    return [tokenizer.decode(sample["input_ids"]) for sample in samples]


def test_splits_are_disjoint_and_the_same_every_time(tmp_path):
    path = str(write_conversations(tmp_path / "c.jsonl"))
    sets = [
        make_supervised_data_module(path, make_tokenizer(), 20, 10, data_cache_dir=str(tmp_path / cache))
        for cache in ("a", "b")
    ]
    train, held_out = (texts_of(sets[0][name]) for name in ("train_dataset", "eval_dataset"))
    assert len(train) == 20 and len(held_out) == 10 and not set(train) & set(held_out)
    assert texts_of(sets[1]["train_dataset"]) == train


def test_a_folder_in_cnn_dailymails_schema_uses_its_own_validation_split(tmp_path):
    for name, count in (("train", 6), ("validation", 3), ("test", 2)):
        rows = [{"article": f"{name} {i}", "highlights": f"short {i}", "id": str(i)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = make_supervised_data_module(str(tmp_path), make_tokenizer(), data_cache_dir=str(tmp_path / "cache"))
    assert len(module["train_dataset"]) == 6
    held_out = texts_of(module["eval_dataset"])
    assert len(held_out) == 3 and all("validation" in text for text in held_out)


@pytest.mark.parametrize(
    "train_size,eval_size,message",
    [
        (41, 0, "--train_size 41"), (0, 40, "--eval_size 40"), (35, 10, "30 samples are available"),
        (-1, 0, "--train_size -1"), (1.5, 0, "--train_size 1.5"),
    ],
)  # fmt: skip
def test_sizes_beyond_the_data_are_refused(tmp_path, train_size, eval_size, message):
    path = str(write_conversations(tmp_path / "c.jsonl"))
    with pytest.raises(ValueError, match=message):
        make_supervised_data_module(path, make_tokenizer(), train_size, eval_size, data_cache_dir=str(tmp_path / "x"))


def test_unknown_datasets_and_columns_are_refused_with_the_choices(tmp_path):
    def read(dataset):
        make_supervised_data_module(str(dataset), make_tokenizer(), data_cache_dir=str(tmp_path / "cache"))

    with pytest.raises(ValueError, match="no-such.*Daring-Anteater, cnn_dailymail, python-docs"):
        read("no-such")
    (tmp_path / "x.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    with pytest.raises(ValueError, match="'question', 'reply'(.|\n)*conversations(.|\n)*messages"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.png.*\.jsonl"):
        read(tmp_path / "x.png")


def test_python_docs_are_many_distinct_answers_in_a_fixed_order():
    samples = read_python_docs()
    answers = [s["conversations"][1]["value"] for s in samples]
    assert 2500 < len(samples) < 4000 and len(set(answers)) == len(answers)
    by_question = {s["conversations"][0]["value"]: s["conversations"][1]["value"] for s in samples}
    from shutil import rmtree

    (question,) = [q for q in by_question if "`shutil.which(" in q]
    assert "Given a command, mode, and a PATH string" in by_question[question] and rmtree
