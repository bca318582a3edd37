"""Render chat templates as transformers does, within limits; whatever a template raises is a bad sample.

Templates are code from elsewhere. transformers compiles them in jinja's sandbox; here they also have limits of time
and memory (limits.py), and one `*` or `**`, which no limit of time could interrupt, cannot make a number or text beyond
all bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jinja2
from transformers.utils import chat_template_utils

from qat.errors import UserError

from ..bad_samples import BadSample
from .limits import LimitedTime, TookTooLong, limited_memory
from .turns import REASONING

MAX_CHARACTERS = 1 << 26  # of one rendered conversation; 8 times the longest line of a file


class Renderer:
    """One chat template and the variables that it is given.

    Args:
        source: the template.
        variables: special tokens by name.
        name: where the template comes from, for messages.

    Raises:
        UserError: the source is no template.
    """

    def __init__(self, source: str, variables: dict[str, str], name: str) -> None:
        self.source, self.variables = source, variables
        compile_template(source, name)

    def render(self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            BadSample: the template raises anything: it refuses the roles, misses a field, divides by zero.
        """
        return self._render(messages, tools, add_generation_prompt, marked=False)[0]

    def render_marked(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans between the template's generation markers."""
        return self._render(messages, tools, add_generation_prompt=False, marked=True)

    def _render(
        self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        template = _compiled(self.source)
        arguments = {
            **self.variables, "messages": _with_reasoning(messages), "tools": tools or None, "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        try:
            if marked:
                text, spans = _recorder.render(template, arguments)
            else:
                text, spans = template.render(arguments), []
        except TookTooLong:
            raise
        except Exception as error:  # a template is a program that is not ours
            raise BadSample("refused by the chat template", describe(error)) from None
        if len(text) > MAX_CHARACTERS:
            detail = f"it makes {len(text) / 2**20:.0f} MiB of one conversation"
            raise BadSample("refused by the chat template", detail)
        return text, spans


def compile_template(source: str, name: str) -> None:
    """Check that `source` is a template.

    Args:
        name: where it comes from, such as "--chat_template 't.jinja'".

    Raises:
        UserError: empty, or a syntax error, with its line.
    """
    remedy = "; give a template as --chat_template FILE.jinja, or --chat_template none for turns joined by newlines"
    if not source.strip():
        raise UserError(f"{name} is empty{remedy}")
    try:
        with limited_memory(), LimitedTime() as limit:
            limit.begin_step()
            _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name} is not a chat template: line {error.lineno}: {describe(error)}{remedy}") from None
    except TookTooLong:
        raise UserError(
            f"{name} is not a chat template: to read it takes more than {limit.seconds:g} s{remedy}"
        ) from None
    except Exception as error:  # constant expressions are computed while the template is compiled
        raise UserError(f"{name} is not a chat template: {describe(error)}{remedy}") from None


def describe(error: BaseException, limit: int = 120) -> str:
    """What a template's error says: one line, at most `limit` characters."""
    text = " ".join(str(error).split())
    if not isinstance(error, jinja2.TemplateError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """An environment of its own as transformers makes it for a chat template, with `*` and `**` bounded."""
    environment = chat_template_utils._compile_jinja_template("{# of data.conversations #}").environment
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.call_binop = _bounded_operation
    [tags] = [e for e in environment.extensions.values() if "generation" in e.tags]
    tags._generation_support = _recorder.block
    return environment


def _bounded_operation(context: object, operator: str, left: object, right: object) -> object:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 10_000:
            raise OverflowError("a power of more than 10,000 bits")
        return left**right  # type: ignore[operator]
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > MAX_CHARACTERS:
            raise MemoryError(f"{len(many)} elements, {times} times")
    return left * right  # type: ignore[operator]


class _Recorder:
    """Records where generation blocks stand in the text; transformers' own takes quadratic time."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.length: int | None = None  # of what was rendered so far; None: nothing is recorded

    def block(self, caller: Callable[[], str]) -> str:
        """A generation block: what the template calls in the place of its tags."""
        text = caller()
        if self.length is not None:
            self.spans.append((self.length, self.length + len(text)))
        return text

    def render(self, template: jinja2.Template, arguments: dict) -> tuple[str, list[tuple[int, int]]]:
        """The text of a template and the spans of its generation blocks."""
        self.spans, self.length, parts = [], 0, []
        try:
            for part in template.generate(arguments):
                parts.append(part)
                self.length += len(part)
        finally:
            self.length = None
        return "".join(parts), self.spans


_recorder = _Recorder()


def _with_reasoning(messages: list[dict]) -> list[dict]:
    """Messages whose thoughts have every name by which templates ask for them, as transformers gives them."""
    if not any(len(message) > 2 and any(name in message for name in REASONING) for message in messages):
        return messages
    result = []
    for message in messages:
        thought = next((message[name] for name in REASONING if name in message), None)
        result.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return result
