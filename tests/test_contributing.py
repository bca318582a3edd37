"""CONTRIBUTING.md names files and functions that exist."""

from __future__ import annotations

import re
from functools import cache

from helpers import ROOT

CODE = re.findall(r"`([^`\n]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@cache
def sources() -> str:
    """The text of all Python files of the project."""
    folders = ("qat", "data", "training", "serving", "benchmarks", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.name != "test_contributing.py")


def test_files_that_it_names_exist():
    paths = {
        word for code in CODE for word in code.split() if re.fullmatch(r"[\w./-]+/[\w./-]+|\w+\.(py|md|txt)", word)
    }
    assert len(paths) > 40
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_names_of_code_that_it_names_exist():
    names = {code.removesuffix("()") for code in CODE if re.fullmatch(r"_?[A-Z]{2,}\w*|_?[a-z]+(_\w+)+(\(\))?", code)}
    names -= {"PYTHON", "test_export_2"}  # of scripts/environment.sh; a bad example
    assert {"PRESETS", "_LAYOUTS", "assert_equals_plain"} <= names
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}", sources())]
