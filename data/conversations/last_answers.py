"""One training sample per answer, for templates that render an answer otherwise once another turn follows.

Qwen3 and DeepSeek-R1 drop the thoughts of earlier turns. A conversation of n answers then is n samples: each is what
the model reads at inference before that answer, and the answer, which alone is learned.

R1's template drops the thought of the last answer, too, and its generation prompt begins one. There the answer is what
the model writes: the text of the turn, thought included, and what the template puts behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .fields import Checked, check_rendered
from .templates import Answer, ChatTemplate, InexactTemplate, Text

_OPEN_THOUGHT = re.compile(r"(<think>)(\s*)$")
_END_OF_THOUGHT = "</think>"
UNTHINKING = "begins a thought in its generation prompt, which the answers lack"


def last_answers(template: ChatTemplate, messages: list[dict], tools: list[dict], turns: list[int]) -> Iterator[Text]:
    """The samples whose last turns are `turns`.

    Raises:
        InexactTemplate: an answer does not follow its generation prompt.
        BadSample: the template refuses a beginning of the conversation, or drops something of it.
    """
    checked = 0
    for turn in turns:
        yield _last_answer(template, messages[: turn + 1], tools, checked)
        checked = turn + 1


def _last_answer(template: ChatTemplate, messages: list[dict], tools: list[dict], first_unchecked: int) -> Text:
    renderer, last = template.renderer(tools), len(messages) - 1
    turns = range(first_unchecked, last + 1)
    through = renderer.render(messages, tools)
    before = template.text_before(renderer, messages, tools, last)
    opened = _OPEN_THOUGHT.search(before)
    prompt = before[: opened.start()] if opened else before
    content, notes = messages[-1]["content"], []
    if not through.startswith(prompt):
        return _behind_prompt(template, messages, tools, turns, before)
    is_dropped = _END_OF_THOUGHT in content and _END_OF_THOUGHT not in through[len(prompt) :]
    if through.startswith(before) and not is_dropped:
        prompt, answer = before, through[len(before) :]
    else:
        answer = through[len(prompt) :]
        if is_dropped:
            answer = _with_thought(answer, content)
            messages = [*messages[:-1], {**messages[-1], "content": _visible(content)}]
        if opened and answer.lstrip().startswith(opened[1]):
            prompt, answer = before, _without(answer.lstrip().removeprefix(opened[1]), opened[2])
        elif opened:
            notes = [UNTHINKING]
    notes += check_rendered(Checked(renderer, through, messages, tools, turns, forgets=True))
    return _text(template, prompt, answer, last, notes)


def _text(template: ChatTemplate, prompt: str, answer: str, turn: int, notes: list[str]) -> Text:
    if not answer:
        raise InexactTemplate("does not render an answer")
    text = prompt + answer
    end, text = template.end_of(text, len(text), is_last=True)
    return Text(text, [Answer(len(prompt), end, turn)], notes)


def _behind_prompt(template: ChatTemplate, messages: list[dict], tools: list[dict], turns: range, before: str) -> Text:
    """The prompt, and the answer as it is rendered behind the last question alone.

    Mistral's template has the system prompt in the last turn, if that is a question: so at inference, and no more when
    the answer has been given.
    """
    renderer, last = template.renderer(tools), len(messages) - 1
    question = max((i for i in range(last) if messages[i]["role"] == "user"), default=0)
    alone = messages[question:]
    through, prompt = renderer.render(alone, tools), template.text_before(renderer, alone, tools, last - question)
    if not question or not through.startswith(prompt):
        raise InexactTemplate("renders a turn differently depending on what follows it")
    read = renderer.render(messages[:-1], tools)
    notes = check_rendered(Checked(renderer, read, messages[:-1], tools, range(turns.start, last), forgets=True))
    answer = range(last - question, last - question + 1)
    notes += check_rendered(Checked(renderer, through, alone, tools, answer, forgets=True))
    return _text(template, before, through[len(prompt) :], last, notes)


def _visible(content: str) -> str:
    return content.rpartition(_END_OF_THOUGHT)[2].strip()


def _with_thought(answer: str, content: str) -> str:
    """`answer`, of which the template dropped the thought, with all of `content`."""
    visible = _visible(content)
    before, found, after = answer.partition(visible)
    if before.strip() or not (found or not visible):
        raise InexactTemplate("drops the thought of an answer and changes the rest")
    return content.strip() + after


def _without(text: str, space: str) -> str:
    """`text` without the white space that the generation prompt ends with, or what stands in its place."""
    return text.removeprefix(space) if space and text.startswith(space) else text.lstrip() if space else text
