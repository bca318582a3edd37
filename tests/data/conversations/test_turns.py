"""What turns carry: weights, history, tools and parts are used, or named as what they are."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from chats import SMOLLM2, TOOL, assistant, call, learned_texts, make_chat_tokenizer, user

from data.bad_samples import BadSample
from data.conversations.formatting import Formatter
from data.conversations.schemas import recognise
from data.conversations.turns import unread

TOKENIZER = make_chat_tokenizer(SMOLLM2)


def learned(row: dict, **kwargs) -> list[str]:
    """What is learned from a row."""
    [[encoded]] = Formatter(TOKENIZER, 4096, **kwargs).encode([recognise(row).sample_of(row)])
    return learned_texts(encoded, TOKENIZER)


def sharegpt(*turns: dict) -> dict:
    return {"conversations": [{"from": "human", "value": "q"}, *turns]}


TWO = ["a<|im_end|>", "b<|im_end|>"]
LEARNED = {
    "weight": ({"messages": [user(), assistant("a", weight=0), user(), assistant("b", weight=1)]}, TWO[1:]),
    "weight of floats": (
        {"messages": [user(), assistant("a", weight=0.0), user(), assistant("b", weight=1.0)]},
        TWO[1:],
    ),
    "train": (
        sharegpt({"from": "gpt", "value": "a", "train": False}, {"from": "gpt", "value": "b", "train": True}),
        TWO[1:],
    ),
    "loss": (
        sharegpt({"from": "gpt", "value": "a", "loss": True}, {"from": "gpt", "value": "b", "loss": False}),
        TWO[:1],
    ),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["q", "b"], "weight": [None, 1]}}, TWO[1:]),
    "history": ({"instruction": "q", "output": "b", "history": [["earlier", "a"]]}, TWO),
    "history as text": ({"instruction": "q", "output": "b", "history": '[["earlier", "a"]]'}, TWO),
    "history of turns": (
        {
            "system": "S",
            "messages": [user(), assistant("b", weight=0), user(), assistant("b")],
            "history": [["q", "a"]],
        },
        TWO,
    ),
    "weight 0 of a question": ({"messages": [{**user(), "weight": 0}, assistant("b")]}, TWO[1:]),
    "null and empty fields": (
        {"messages": [user(), assistant("b", tool_calls=[], name=None, thinking="", weight=float("nan"))]},
        TWO[1:],
    ),
    "bookkeeping": ({"messages": [{**user(), "id": 7}, assistant("b", timestamp=1.5)], "source": "web"}, TWO[1:]),
    "equal system prompts": (
        {"system": "S", "messages": [{"role": "system", "content": "S "}, user(), assistant("b")]},
        TWO[1:],
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_answers_are_learned_as_their_turns_say(name):
    row, expected = LEARNED[name]
    assert learned(row) == expected


REFUSED = {
    "half a weight": ({"messages": [user(), assistant(weight=0.5)]}, "unsupported field: weight 0.5 of the assistant"),
    "a weight as text": ({"messages": [user(), assistant(weight="1")]}, "unsupported field: weight '1'"),
    "a learned question": ({"messages": [{**user(), "train": True}, assistant()]}, "train True of a user turn"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": "x"}])]},
        "the user turn has a part of type 'image_url'",
    ),
    "a part with more": ({"messages": [user([{"type": "text", "text": "x", "cache": 1}])]}, "a part with cache"),
    "images": ({"messages": [user(), assistant()], "images": ["x.png"]}, "unsupported field: the column images"),
    "functions": ({"prompt": "q", "completion": "a", "functions": [{"name": "f"}]}, "the column functions"),
    "two system prompts": (
        {"system": "A", "messages": [{"role": "system", "content": "B"}, user()]},
        "'A', the system turn 'B'",
    ),
    "history of single texts": ({"instruction": "q", "output": "a", "history": ["a"]}, "not a list of pairs"),
    "tools as a word": ({"messages": [user(), assistant()], "tools": "clock"}, "tools is text that is not a JSON list"),
    "a list of words": ({"messages": [user(), assistant()], "tools": [1]}, "not a list of objects"),
    "a surrogate in a call": ({"messages": [user(), assistant(tool_calls=[call("\ud800")])]}, "lone surrogate"),
    "no text and no call": ({"messages": [user(), assistant(None)]}, "empty turn: the assistant turn is empty"),
    "two forms": (sharegpt({"from": "gpt", "value": "a", "content": "b"}), "from and value, and role or content"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_named(name):
    row, message = REFUSED[name]
    with pytest.raises(BadSample) as raised:
        recognise(row).sample_of(row)
    assert message in str(raised.value)


def test_all_answers_masked_leave_nothing_to_learn():
    row = {"messages": [user(), assistant(weight=0)]}
    [error] = Formatter(TOKENIZER, 99).encode([recognise(row).sample_of(row)])
    assert isinstance(error, BadSample) and "all have weight 0" in str(error)


def test_with_train_on_all_a_masked_answer_alone_is_not_learned():
    row = {"messages": [user("one"), assistant("BAD", weight=0), user("two"), assistant("GOOD")]}
    text = "|".join(learned(row, train_on="all"))
    assert "one" in text and "two" in text and "GOOD" in text and "BAD" not in text


def test_tools_and_calls_are_the_same_as_json_text_and_as_objects():
    as_text = call()
    as_text["function"]["arguments"] = '{"zone": "CET"}'
    rows = [
        {"messages": [user(), assistant(None, tool_calls=[call(zone="CET")])], "tools": [TOOL]},
        {"messages": [user(), {"role": "assistant", "tool_calls": [as_text]}], "tools": json.dumps([TOOL])},
        {"messages": [user(), assistant("", tool_calls=json.dumps([call(zone="CET")]))], "tools": [json.dumps(TOOL)]},
    ]
    first, *others = [recognise(row).sample_of(row) for row in rows]
    assert first["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"zone": "CET"} and first["tools"] == [
        TOOL
    ]
    assert others == [first, first]


def test_columns_and_keys_that_say_nothing_to_the_model_are_listed():
    row = {"messages": [{**user(), "id": 1}, assistant(timestamp=2)], "id": 3, "source": "", "score": 0, "tools": []}
    assert unread(row, {"messages", "tools"}) == {"id", "score", "messages.id", "messages.timestamp"}
    assert unread({"text": "x", "system": "y"}, {"text"}) == {"system"}


def test_keys_that_a_table_fills_with_nulls_are_no_arguments_of_a_call():
    def row(name: str, **arguments) -> dict:
        return {"messages": [user(), assistant("", tool_calls=[call(name, **arguments)])], "tools": [TOOL]}

    apart = [row("add", a=1), row("clock", zone="UTC")]
    together = pa.Table.from_pylist(apart).to_pylist()
    assert together != apart and together[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    assert [recognise(r).sample_of(r) for r in together] == [recognise(r).sample_of(r) for r in apart]
