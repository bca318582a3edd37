"""Templates that raise, loop or fill the memory are bad samples; files that are no templates are refused by name."""

from __future__ import annotations

import threading
import time

import jinja2
import pytest
from chats import MARKED, QWEN, SMOLLM2, assistant, make_chat_tokenizer, user
from transformers.utils.chat_template_utils import render_jinja_template

from data.bad_samples import BadSample
from data.conversations import limits
from data.conversations.formatting import Formatter, set_chat_template
from data.conversations.rendering import Renderer
from qat.errors import UserError

SAMPLE = {"messages": [user(), assistant()]}
TWO = "(messages | length)"
BOMBS = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    f"{{{{ 1 / ({TWO} - 2) }}}}": "ZeroDivisionError",
    "{{ messages[0].content.index('zz') }}": "ValueError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ range(10 ** 6) }}": "OverflowError",
    f"{{{{ 9 ** (9 ** (9 * {TWO})) }}}}": "OverflowError",
    "{{ 'x' * 10 ** 10 }}": "MemoryError",
    "{{ messages[0].content | center(10 ** 10) }}": "MemoryError",
    "{{ messages.missing.content }}": "'list object' has no attribute 'missing'",
    "{{ messages.append(1) }}": "unsafe",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 0.2 s",
    "{{ 'x' * 2 ** 26 ~ 'x' }}": "it makes 64 MiB of one conversation",
}


@pytest.mark.parametrize("template", BOMBS)
def test_whatever_a_template_raises_is_a_bad_sample(monkeypatch, template):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    [error] = Formatter(make_chat_tokenizer(template), 99).encode([SAMPLE])
    assert isinstance(error, BadSample) and error.kind == "refused by the chat template"
    assert BOMBS[template] in str(error) and len(str(error)) < 200


def test_a_template_that_never_ends_is_an_error_once_several_samples_in_a_row_show_it(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="3 samples in a row.*--chat_template"):
        Formatter(make_chat_tokenizer(loop), 99).encode([SAMPLE] * 3)


def test_the_limits_leave_no_timer_and_no_memory_limit_behind():
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    Formatter(make_chat_tokenizer("{{ 1 / 0 }}"), 99).encode([SAMPLE])
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))


def test_the_time_of_a_step_begins_with_it():
    with limits.LimitedTime(0.1) as limit:
        for _ in range(4):  # longer than the limit together
            limit.begin_step()
            begin = time.thread_time()
            while time.thread_time() - begin < 0.07:
                pass
        limit.begin_step()
        with pytest.raises(limits.TookTooLong):
            while True:
                pass


def test_the_time_of_other_threads_does_not_count():
    others = [threading.Thread(target=sum, args=(range(10**7),)) for _ in range(2)]
    with limits.LimitedTime(0.05) as limit:
        limit.begin_step()
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()


FILES = {
    "syntax": (b"{{ bos_token }}\n{% for m in messages %}\n{{ m. }}", "line 3: expected name or number"),
    "filter": (b"{{ messages | nofilter }}", "line 1: No filter named 'nofilter'"),
    "binary": (bytes(range(256)), "cannot be read as text"),
    "nul": (b"{{ messages }}\0", "is a binary file"),
    "empty": (b" \n", "is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_template_is_refused_with_argument_file_and_line(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / f"{name}.jinja"
    path.write_bytes(content)
    tokenizer = make_chat_tokenizer(SMOLLM2)
    with pytest.raises(UserError) as raised:
        set_chat_template(tokenizer, str(path))
    assert f"--chat_template {str(path)!r}" in str(raised.value) and message in str(raised.value)
    assert tokenizer.chat_template == SMOLLM2
    if name in ("syntax", "filter"):  # the same template in a tokenizer's folder
        tokenizer.chat_template = content.decode()
        with pytest.raises(UserError, match="chat template of the tokenizer(.|\n)*--chat_template FILE.jinja"):
            Formatter(tokenizer, 99)


@pytest.mark.parametrize("template", [SMOLLM2, QWEN, MARKED])
def test_texts_and_spans_are_those_of_transformers(template):
    messages = [user("a"), assistant(" b "), user("c"), assistant("🙂", reasoning="why")]
    variables = {"bos_token": "<s>"}
    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=template == MARKED, **variables
    )
    renderer = Renderer(template, variables, "the template")
    assert renderer.render(messages) == texts[0]
    if template == MARKED:
        assert renderer.render_marked(messages) == (texts[0], spans[0])


def test_thoughts_have_the_names_that_templates_know_them_by():
    renderer = Renderer("{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}", {}, "the template")
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert renderer.render([assistant("x", **{name: "why"})]) == "why|why"
    assert renderer.render([assistant("x")]) == "|"


def test_jinjas_environment_is_not_shared_with_transformers():
    from data.conversations.rendering import _environment

    Renderer("{{ 2 * 3 }}", {}, "the template")
    [texts, _] = render_jinja_template([[user()]], chat_template="{{ 'x' * 3 }}")
    assert texts == ["xxx"] and "**" in _environment().intercepted_binops
    assert not jinja2.sandbox.SandboxedEnvironment.intercepted_binops
