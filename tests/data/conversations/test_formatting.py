"""Labels are exactly what the assistant says, for any conversation and template; else an error says why not."""

from __future__ import annotations

import pytest
from chats import END_OF_TURN, FORGETFUL, MARKED, TEMPLATES, learned_texts, make_chat_tokenizer
from helpers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.bad_samples import BadSample
from data.conversations.formatting import IGNORE_INDEX, Formatter, set_chat_template
from data.conversations.templates import InexactTemplate

# No lone surrogates (refused before), and no text that is a special token of the template itself.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="<")
TEXT = st.text(CHARACTERS, min_size=1, max_size=40).filter(str.strip)
EDGES = st.sampled_from(["\n\n  x", "    indented\n", "é", "🙂", " x ", "assistant", "\nuser\n", "1\n\n2"])
WORDS = TEXT | EDGES


@st.composite
def conversations(draw) -> list[dict]:
    """A system prompt or none, then one to four exchanges."""
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(WORDS)}, {"role": "assistant", "content": draw(WORDS)}]
    return messages


TOKENIZERS = {name: make_chat_tokenizer(template) for name, template in TEMPLATES.items()}
FORMATTERS = {name: Formatter(tokenizer, 4096) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(messages=conversations())
def test_decoding_the_labelled_tokens_gives_exactly_the_assistant_turns(name, messages):
    tokenizer = TOKENIZERS[name]
    [[encoded]] = FORMATTERS[name].encode([{"messages": messages}])
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [(turn.strip() if name == "llama3" else turn) + END_OF_TURN[name] for turn in turns]
    assert learned_texts(encoded, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_prompt_has_the_very_tokens_that_inference_gives_it(name):
    tokenizer = TOKENIZERS[name]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\n    x"}]
    [[encoded]] = FORMATTERS[name].encode([{"messages": messages}])
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt


def test_markers_decide_and_the_end_of_turn_outside_of_them_is_learned_too():
    tokenizer = make_chat_tokenizer(MARKED)
    formatter = Formatter(tokenizer, 4096)
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("a", " b 🙂", "c", "d"), strict=True)]
    [[encoded]] = formatter.encode([{"messages": messages}])
    assert learned_texts(encoded, tokenizer) == [" b 🙂<|im_end|>", "d<|im_end|>"]
    assert "generation markers" in formatter.description


def test_a_template_that_changes_earlier_turns_gives_one_sample_per_answer_unless_all_is_learned():
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    tokenizer = make_chat_tokenizer(FORGETFUL)
    [samples] = Formatter(tokenizer, 4096).encode([{"messages": messages}])
    for sample, count in zip(samples, (2, 4), strict=True):  # each as the model sees it before that answer
        rendered = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        assert tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False) == rendered
        assert learned_texts(sample, tokenizer) == ["<think></think>x<|im_end|>"]
    [[encoded]] = Formatter(tokenizer, 4096, train_on="all").encode([{"messages": messages}])
    assert (encoded.labels[1:] == encoded.input_ids[1:]).all() and encoded.labels[0] == IGNORE_INDEX


def test_a_template_whose_answers_do_not_follow_their_prompt_is_refused():
    tokenizer = make_chat_tokenizer("{{ messages | length }}" + TEMPLATES["smollm2"])
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    with pytest.raises(InexactTemplate, match="differently depending on what follows.*--train_on all"):
        Formatter(tokenizer, 4096).encode([{"messages": messages}])


def test_a_conversation_that_begins_with_the_assistant_is_labelled_too():
    messages = [{"role": role, "content": role[0]} for role in ("assistant", "user", "assistant")]
    [[encoded]] = FORMATTERS["smollm2"].encode([{"messages": messages}])
    assert learned_texts(encoded, TOKENIZERS["smollm2"]) == ["a<|im_end|>", "a<|im_end|>"]


def test_what_the_template_refuses_is_a_bad_sample_with_its_words():
    tokenizer = make_chat_tokenizer("{{ raise_exception('no system prompts here') }}")
    [error] = Formatter(tokenizer, 99).encode([{"messages": [{"role": "assistant", "content": "x"}]}])
    assert isinstance(error, BadSample) and "no system prompts here" in str(error)


def test_the_newline_format_is_incs_with_a_learned_end_of_sequence():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    [[encoded]] = Formatter(tokenizer, 99, chat_template="none").encode([{"messages": messages}])
    assert tokenizer.decode(encoded.input_ids) == "<s>Hi?\nYes.\n</s>"
    assert learned_texts(encoded, tokenizer) == ["Yes.\n</s>"]


def test_plain_text_is_learned_whole_and_closed():
    tokenizer = make_tokenizer()
    [[encoded]] = Formatter(tokenizer, 99).encode([{"text": "abc"}])
    assert tokenizer.decode(encoded.input_ids) == "abc</s>"
    assert encoded.labels.tolist() == [IGNORE_INDEX, *encoded.input_ids[1:].tolist()]


def test_a_tokenizer_with_an_invisible_first_space_labels_by_offsets():
    words = {"<s>": 0, "</s>": 1, "▁hi": 2, "▁yes": 3, "▁": 4, "\n": 5, "▁no": 6, "hi": 7, "yes": 8, "no": 9}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    formatter = Formatter(tokenizer, 99)
    [[encoded]] = formatter.encode([{"messages": messages}])
    assert not formatter._encoder.pieces_join
    learned = [int(label) for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learned) == ["yes", "</s>"]  # apart, it would have been "▁yes"


def test_a_template_file_is_given_to_the_tokenizer_and_a_missing_one_refused(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "t.jinja").write_text(MARKED)
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == MARKED
    with pytest.raises(ValueError, match="--chat_template 'missing.jinja'"):
        set_chat_template(tokenizer, "missing.jinja")
