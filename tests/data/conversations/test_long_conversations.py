"""Long conversations take linear time, and have the labels that rendering every beginning gives."""

from __future__ import annotations

import pytest
from chats import (
    MARKED,
    REAL,
    TEMPLATES,
    assistant,
    call,
    learned_texts,
    make_chat_tokenizer,
    make_real_tokenizer,
    tool,
    user,
)

from data.conversations import formatting
from data.conversations.formatting import Formatter, LeftOut
from data.conversations.rendering import Renderer
from data.conversations.templates import ChatTemplate

GLM = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|eot_id|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eot_id|>' }}{% endif %}"
)


def exchanges(count: int) -> list[dict]:
    return [user(f"q{i // 2} ") if i % 2 == 0 else assistant(f" a{i // 2}\n") for i in range(count)]


CONVERSATIONS = {
    "exchanges": exchanges(61),
    "system": [{"role": "system", "content": "S"}, *exchanges(60)],
    "answers alone": [user(), *[assistant(f"a{i}") for i in range(50)]],
    "questions in a row": [assistant(f"{i}") if i % 5 == 4 else user(f"{i}") for i in range(70)],
    "tools": [user(), *(m for i in range(25) for m in (assistant("", tool_calls=[call(z=i)]), tool(f"r{i}")))],
    "an odd border": [*exchanges(30), assistant("more"), *exchanges(31), user("z")],
}


def oracle(template: ChatTemplate, messages: list[dict]) -> list[tuple[int, int]]:
    """Where answers stand, from what is rendered before each answer and through it."""
    special = tuple(template.special_tokens)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            through = template.plain.render(messages[: i + 1])
            end = len(through.rstrip()) if through.rstrip().endswith(special) else len(through)
            spans.append((len(template.plain.render(messages[:i], None, True)), end))
    return spans


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*TEMPLATES, "mistral_v3", "llama31"])
def test_windows_find_the_answers_that_all_beginnings_find(name, conversation):
    tokenizer = make_real_tokenizer(name) if name in REAL else make_chat_tokenizer(TEMPLATES[name])
    template, messages = ChatTemplate(tokenizer), CONVERSATIONS[conversation]
    if (name, conversation) == ("mistral_v3", "system"):
        pytest.skip("the system prompt moves to the last question, so each answer is a sample of its own")
    if conversation == "tools" and name in TEMPLATES:
        messages = [{key: m[key] for key in ("role", "content")} | {"content": m["content"] or "x"} for m in messages]
    result = template.labelled(messages, [])
    assert [(answer.start, answer.end) for answer in result.answers] == oracle(template, messages)
    assert [a.turn for a in result.answers] == [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert result.text == template.plain.render(messages)


def test_a_template_that_ends_answers_with_the_next_turns_token_learns_that_token():
    tokenizer = make_chat_tokenizer(GLM)
    for count in (2, 4, 41):
        [[encoded]] = Formatter(tokenizer, 4096).encode([{"messages": exchanges(count)}])
        expected = [f" a{i}\n<|im_start|>" for i in range(count // 2)]
        assert learned_texts(encoded, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(exchanges(2), tokenize=False)
    [[encoded]] = Formatter(tokenizer, 4096).encode([{"messages": exchanges(2)}])
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == rendered + "<|im_start|>"


@pytest.fixture
def rendered_turns(monkeypatch) -> list[int]:
    """The numbers of messages of all renderings."""
    counts: list[int] = []
    render = Renderer._render

    def counting(self, messages, *args, **kwargs):
        counts.append(len(messages))
        return render(self, messages, *args, **kwargs)

    monkeypatch.setattr(Renderer, "_render", counting)
    return counts


@pytest.mark.parametrize("name", [*TEMPLATES, "marked"])
def test_work_grows_with_the_number_of_turns_and_ends_at_the_maximum_length(rendered_turns, name):
    tokenizer = make_chat_tokenizer(TEMPLATES.get(name, MARKED))
    work = []
    for count in (500, 1000):
        rendered_turns.clear()
        [[encoded]] = Formatter(tokenizer, 10**6).encode([{"messages": exchanges(count)}])
        assert not encoded.was_truncated and len(learned_texts(encoded, tokenizer)) == count // 2
        work.append(sum(rendered_turns))
    assert work[1] < 2.5 * work[0] < 100 * 500
    rendered_turns.clear()
    [[encoded]] = Formatter(tokenizer, 512).encode([{"messages": exchanges(20_000)}])
    assert encoded.was_truncated and len(encoded.input_ids) == 512 and max(rendered_turns) < 300


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", [*TEMPLATES, "marked"])
def test_a_beginning_gives_the_tokens_that_the_whole_gives(monkeypatch, name, train_on):
    tokenizer = make_chat_tokenizer(TEMPLATES.get(name, MARKED))
    formatter = Formatter(tokenizer, 700, train_on)
    messages = exchanges(400)
    [[part]] = formatter.encode([{"messages": messages, "masked": [3]}])
    monkeypatch.setattr(formatting, "LONG", 10**6)
    [[whole]] = formatter.encode([{"messages": messages, "masked": [3]}])
    assert part.input_ids.tolist() == whole.input_ids.tolist() and part.labels.tolist() == whole.labels.tolist()


def test_an_answer_far_beyond_the_maximum_length_is_left_out_with_about_the_tokens_that_reach_it():
    tokenizer = make_chat_tokenizer(TEMPLATES["smollm2"])
    messages = [user(f"{i % 10}") for i in range(1000)] + [assistant()]
    [[result]] = Formatter(tokenizer, 100).encode([{"messages": messages}])
    exact = len(tokenizer(tokenizer.apply_chat_template(messages[:-1], tokenize=False))["input_ids"])
    assert isinstance(result, LeftOut) and result.needed == pytest.approx(exact, rel=0.05)


def test_every_answer_of_a_long_conversation_that_is_split_is_a_sample_or_left_out():
    messages = exchanges(400)
    [samples] = Formatter(make_real_tokenizer("qwen3"), 300).encode([{"messages": messages}])
    left_out = [sample for sample in samples if isinstance(sample, LeftOut)]
    assert len(samples) == 200 and 0 < len(left_out) < 200 and all(sample.needed > 300 for sample in left_out)
