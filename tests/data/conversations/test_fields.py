"""No field of a sample is dropped without being rendered, masked or reported."""

from __future__ import annotations

import json

import pytest
from chats import (
    MARKED,
    REAL,
    SMOLLM2,
    TOOL,
    assistant,
    call,
    learned_texts,
    make_chat_tokenizer,
    make_real_tokenizer,
    tool,
    user,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from data.bad_samples import BadSample
from data.conversations.formatting import Formatter
from data.conversations.schemas import recognise

TOKENIZERS = {name: make_real_tokenizer(name) for name in REAL}
FORMATTERS = {name: Formatter(tokenizer, 4096) for name, tokenizer in TOKENIZERS.items()}
CALLED = {"messages": [user(), assistant(None, tool_calls=[call(zone="CET")])], "tools": [TOOL]}
ROUND = {**CALLED, "messages": [*CALLED["messages"], tool(), assistant("noon")]}
BOTH = {**CALLED, "messages": [user(), assistant("Let me look.", tool_calls=[call(zone="CET")])]}
TWO_CALLS = {**CALLED, "messages": [user(), assistant(None, tool_calls=[call(zone="CET"), call("date", day="x")])]}
THOUGHT = {"messages": [user(), assistant("a", reasoning_content="because")]}
THINKING = {"messages": [user(), assistant("a", thinking="because")]}
PARTIAL = {"messages": [user(), assistant("a", partial=True)]}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, user(), assistant("a")]}

# What the last sample of the row learns, or what is wrong with it, by the formats of these models.
_Q, _H = "<think>\n\n</think>\n\n", "<|channel|>final<|message|>"
EXPECTED = {
    ("qwen3", "CALLED"): [_Q + '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call><|im_end|>'],
    ("qwen3", "ROUND"): [_Q + "noon<|im_end|>"],
    ("qwen3", "TWO_CALLS"): [
        _Q + '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "date", "arguments": {"day": "x"}}\n</tool_call><|im_end|>'
    ],
    ("qwen3", "THOUGHT"): ["<think>\nbecause\n</think>\n\na<|im_end|>"],
    ("qwen3", "THINKING"): ["<think>\nbecause\n</think>\n\na<|im_end|>"],
    ("qwen3", "PARTIAL"): "does not render partial of the assistant turn 2",
    ("llama31", "CALLED"): ['{"name": "clock", "parameters": {"zone": "CET"}}<|eot_id|>'],
    ("llama31", "ROUND"): ['{"name": "clock", "parameters": {"zone": "CET"}}<|eot_id|>', "noon<|eot_id|>"],
    ("llama31", "BOTH"): "does not render content of the assistant turn 2",
    ("llama31", "TWO_CALLS"): "This model only supports single tool-calls at once!",
    ("llama31", "THOUGHT"): "does not render reasoning_content of the assistant turn 2",
    ("mistral_v3", "CALLED"): ['[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "CET"}, "id": "call12345"}]</s>'],
    ("mistral_v3", "ROUND"): [
        '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "CET"}, "id": "call12345"}]</s>', " noon</s>",
    ],
    ("mistral_v3", "BOTH"): "does not render content of the assistant turn 2",
    ("mistral_v3", "SYSTEM"): [" a</s>"],
    ("gpt_oss", "CALLED"): [' to=functions.clock<|channel|>commentary json<|message|>{"zone": "CET"}<|call|>'],
    ("gpt_oss", "ROUND"): [
        ' to=functions.clock<|channel|>commentary json<|message|>{"zone": "CET"}<|call|>', f"{_H}noon<|return|>",
    ],
    ("gpt_oss", "TWO_CALLS"): "does not render tool_calls[1].function.name of the assistant turn 2",
    ("gpt_oss", "THINKING"): [f"<|channel|>analysis<|message|>because<|end|><|start|>assistant{_H}a<|return|>"],
    ("r1_distill", "SYSTEM"): ["a<|end_of_sentence|>"],
    ("r1_distill", "CALLED"): "does not render tool_calls of the assistant turn 2, tools",
    ("r1_distill", "THOUGHT"): "does not render reasoning_content of the assistant turn 2",
}  # fmt: skip


@pytest.mark.parametrize("name,row", EXPECTED)
def test_what_turns_carry_is_learned_where_the_template_renders_it_and_named_where_not(name, row):
    sample = recognise(globals()[row]).sample_of(globals()[row])
    [result] = FORMATTERS[name].encode([json.loads(json.dumps(sample))])
    expected = EXPECTED[name, row]
    if isinstance(expected, str):
        assert isinstance(result, BadSample) and expected in str(result)
    else:
        assert learned_texts(result[-1], TOKENIZERS[name]) == expected


def test_tools_and_system_prompts_are_in_what_the_model_reads():
    for name in ("qwen3", "llama31", "mistral_v3", "gpt_oss"):
        [[*_, sample]] = FORMATTERS[name].encode([recognise(ROUND).sample_of(ROUND)])
        text = TOKENIZERS[name].decode(sample.input_ids)
        assert "clock" in text.partition("CET")[0] and "12:00" in text
    [[sample]] = FORMATTERS["mistral_v3"].encode([SYSTEM])  # in the last question alone, as at inference
    assert TOKENIZERS["mistral_v3"].decode(sample.input_ids) == "<s>[INST] Be brief.\n\nq[/INST] a</s>"


def test_links_and_details_of_tools_may_be_dropped_and_are_listed():
    [samples] = FORMATTERS["gpt_oss"].encode([recognise(ROUND).sample_of(ROUND)])
    assert set(samples[0].notes) == {
        "drops tool_call_id",
        "drops tools[].function.parameters.properties.zone.description",
    }
    [[sample]] = FORMATTERS["mistral_v3"].encode([recognise(ROUND).sample_of(ROUND)])
    assert sample.notes == ()


@pytest.mark.parametrize("role", ["ipython", "observation", "function"])
def test_a_tool_role_that_the_template_has_no_place_for_is_named(role):
    row = {"messages": [*CALLED["messages"], {"role": role, "content": "12"}, assistant("x")], "tools": [TOOL]}
    [result] = FORMATTERS["qwen3"].encode([recognise(row).sample_of(row)])
    assert f"does not render content of the {role} turn 3" in str(result)
    [result] = FORMATTERS["llama31"].encode([recognise(row).sample_of(row)])
    assert (role != "ipython") or "12<|eot_id|>" in TOKENIZERS["llama31"].decode(result[0].input_ids)


def test_a_number_as_the_id_of_a_call_a_thought_under_two_names_and_two_thoughts():
    numbered = {"messages": [*CALLED["messages"], {**tool(), "tool_call_id": 7}, assistant("x")], "tools": [TOOL]}
    [samples] = FORMATTERS["llama31"].encode([recognise(numbered).sample_of(numbered)])
    assert samples[0].notes == ("drops tool_call_id",)
    twice = {"messages": [user(), assistant("a", thinking="t", reasoning_content="t")]}
    [[sample]] = FORMATTERS["qwen3"].encode([recognise(twice).sample_of(twice)])
    assert learned_texts(sample, TOKENIZERS["qwen3"]) == ["<think>\nt\n</think>\n\na<|im_end|>"]
    two = {"messages": [user(), assistant("a", thinking="one", reasoning_content="two")]}
    [result] = FORMATTERS["qwen3"].encode([recognise(two).sample_of(two)])
    assert "does not render thinking of the assistant turn 2" in str(result)


def test_a_system_prompt_that_the_template_drops_is_named_also_if_its_text_stands_elsewhere():
    without = SMOLLM2.replace(
        "{{ '<|im_start|>' + m['role']", "{{ '' if m['role'] == 'system' else '<|im_start|>' + m['role']"
    )
    formatter = Formatter(make_chat_tokenizer(without), 99)
    for text in ("q", "Be brief and kind."):
        row = {"system": text, "messages": [user("q"), assistant("a")]}
        [result] = formatter.encode([recognise(row).sample_of(row)])
        assert "does not render content of the system turn 1" in str(result)


# ---- Any field at all ----

WORDS = st.integers(0, 999_999).map(lambda n: f"w{n:06}")
VALUES = st.recursive(
    WORDS | st.booleans() | st.integers(10**7, 10**8),
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(WORDS, inner, min_size=1, max_size=2),
    max_leaves=4,
)
KEYS = ["tool_calls", "function_call", "reasoning_content", "thinking", "name", "partial", "prefix", "audio", "weight"]


def leaves(value: object) -> list[str]:
    """Words and numbers in a value, names of keys aside."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if isinstance(value, bool) else [str(value)]


@st.composite
def rows(draw) -> dict:
    """One or two exchanges whose turns carry some of KEYS, and perhaps tools."""
    messages = []
    for _ in range(draw(st.integers(1, 2))):
        messages += [user(draw(WORDS)), assistant(draw(WORDS))]
    for message in messages:
        for key in draw(st.lists(st.sampled_from(KEYS), max_size=1)):
            value = draw(VALUES)
            if key == "tool_calls":
                value = [call(draw(WORDS), **{draw(WORDS): value})]
            elif key == "weight":
                value = draw(st.sampled_from([0, 1, 0.5]))
            message[key] = value
    row = {"messages": messages}
    if draw(st.booleans()):
        row["tools"] = [{"type": "function", "function": {"name": draw(WORDS), "parameters": draw(VALUES)}}]
    return row


PRINTING = (  # prints thoughts, calls and tools, and drops all else
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANY = {
    **{name: (tokenizer, FORMATTERS[name]) for name, tokenizer in TOKENIZERS.items()},
    **{
        name: (tokenizer, Formatter(tokenizer, 4096))
        for name, tokenizer in {
            "plain": make_chat_tokenizer(SMOLLM2), "printing": make_chat_tokenizer(PRINTING),
            "marked": make_chat_tokenizer(MARKED),
        }.items()
    },
}  # fmt: skip

TWO_ANSWERS = {"messages": [user("w1"), assistant("w2"), user("w3"), assistant("w4")]}
APART = {  # templates that change earlier turns, so that each answer is a sample of its own
    name for name, (_, f) in ANY.items() if len(f.encode([recognise(TWO_ANSWERS).sample_of(TWO_ANSWERS)])[0]) > 1
}


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=40, deadline=None)
@example(row={"messages": [user("w1"), assistant("w2"), user("w3"), {**assistant("w4"), "weight": 0}]})
@given(row=rows())
def test_no_field_is_dropped_without_being_rendered_masked_or_reported(name, row):
    tokenizer, formatter = ANY[name]
    try:
        [result] = formatter.encode([recognise(row).sample_of(row)])
    except BadSample as error:
        result = error
    if isinstance(result, BadSample):
        return  # reported
    text = "".join(tokenizer.decode(sample.input_ids) for sample in result)
    learned = "".join("".join(learned_texts(sample, tokenizer)) for sample in result)
    notes = "".join(note for sample in result for note in sample.notes)
    masked = [message["role"] == "user" or message.get("weight") == 0 for message in row["messages"]]
    for index, (message, is_masked) in enumerate(zip(row["messages"], masked, strict=True)):
        if name in APART and all(masked[index:]):
            continue  # no learned answer follows it, so it is in no sample
        for key, value in message.items():
            if key in ("role", "weight"):
                continue
            for leaf in set(leaves(value)) - {"function", "call12345"}:
                assert leaf in (text if is_masked else learned), (key, leaf)
    assume("tools" in row)
    assert row["tools"][0]["function"]["name"] in text
    for leaf in leaves(row["tools"]):
        assert leaf in text or "drops tools" in notes


def test_the_property_sees_samples_of_every_outcome():
    """Rows that the printing template renders whole are samples, so that the property is not about refusals alone."""
    row = {**BOTH, "messages": [user(), assistant("x", tool_calls=[call(zone="CET")], thinking="t")]}
    tokenizer, formatter = ANY["printing"]
    [[sample]] = formatter.encode([recognise(row).sample_of(row)])
    [learned] = learned_texts(sample, tokenizer)
    assert learned.startswith("<think>t</think>x[{") and '"zone": "CET"' in learned
