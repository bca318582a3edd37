"""The embedded dataset: questions about Python, answered by the Python installation's own documentation.

It needs no network and is the same on every machine with the same Python version: the language reference that ships as
`pydoc_data.topics`, the docstrings of public functions and classes in the standard library's source files (parsed,
never imported, so nothing runs), and those of the built-in modules.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

MIN_ANSWER_CHARACTERS = 72  # shorter docstrings ("Return self.") teach nothing
_SKIPPED_PARTS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "__pycache__"}
# Built into every CPython, whatever the platform.
_C_MODULES = ("builtins", "gc", "itertools", "marshal", "sys", "time", "_io", "_collections", "_functools", "_operator")


def read_python_docs() -> list[dict]:
    """About 3,000 one-turn conversations in Daring-Anteater's schema, in a fixed order, no two answers alike.

    How many there are depends on the distribution of Python: 2,930 in Debian's 3.11.2, 3,400 in a complete 3.11.7.
    """
    return [
        {"conversations": [{"from": "User", "value": question}, {"from": "Assistant", "value": answer}]}
        for question, answer in _distinct()
    ]


@cache  # parsing the standard library takes seconds
def _distinct() -> tuple[tuple[str, str], ...]:
    question_of: dict[str, str] = {}
    for question, answer in _questions_and_answers():
        answer = answer.strip()
        if len(answer) >= MIN_ANSWER_CHARACTERS:
            question_of.setdefault(answer, question)
    return tuple((question, answer) for answer, question in question_of.items())


def _questions_and_answers() -> Iterator[tuple[str, str]]:
    for topic in sorted(topics):
        yield f"What does Python's language reference say about {topic!r}?", topics[topic]
    for module, path in _standard_library_files():
        yield from _docstrings_of_file(module, path)
    for module in _C_MODULES:
        yield from _docstrings_of_module(module)


def _standard_library_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        is_private = any(part.startswith("_") and part != "__init__" for part in parts)
        if parts[0] in sys.stdlib_module_names and not is_private and not _SKIPPED_PARTS.intersection(parts):
            yield ".".join(part for part in parts if part != "__init__"), path


def _docstrings_of_file(module: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
        return
    if text := ast.get_docstring(tree):
        yield f"What is the Python module `{module}` for?", text
    for node in tree.body:
        yield from _docstrings_of_node(module, node)


def _docstrings_of_node(owner: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return
    name = f"{owner}.{node.name}"
    text = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        if text:
            yield f"What is the class `{name}` in Python's standard library?", text
        for member in node.body:
            yield from _docstrings_of_node(name, member)
    elif text:
        yield f"What does `{name}({ast.unparse(node.args)})` do in Python's standard library?", text


def _docstrings_of_module(module: str) -> Iterator[tuple[str, str]]:
    namespace = vars(__import__(module))
    for name in sorted(namespace):
        value = namespace[name]
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if text := inspect.getdoc(value):
            yield f"What does Python's built-in `{module.lstrip('_')}.{name}` do?", text
