"""Every wrong command line of every program ends in one line, `error: ...`, that names what is wrong, with status 2.

Nothing is left of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from command_lines import make_files, read_rows, words_of
from helpers import ROOT

import main
from benchmarks import models, real_models
from data import preview
from qat.errors import reported_in_one_line
from training.estimate import program as estimate
from training.sensitivity import measure
from training.start.start import Start

ROWS = read_rows()


def script(name: str):
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"command_line_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def programs() -> dict:
    export, evaluate, report = map(script, ("export", "evaluate", "quickstart_report"))
    return {
        "main": main.main, "export": export.main, "evaluate": evaluate.main, "preview": preview.main,
        "sensitivity": measure.main, "estimate": estimate.main,
        "real_models": real_models.main, "real_files": models.main,
        "quickstart_report": lambda argv: report.main(report.parse(argv)),
    }  # fmt: skip


def never(*_args, **_kwargs):
    raise AssertionError("weights are read")


@pytest.mark.parametrize("program,words,named", ROWS, ids=lambda value: value[:80] if isinstance(value, str) else None)
def test_a_wrong_command_line_ends_in_one_line_before_weights_are_read_and_leaves_no_folder(
    program, words, named, files, programs, monkeypatch, capfd, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Start, "load_model", never)
    names = files | {"new": tmp_path / "new"}
    with pytest.raises(SystemExit) as stopped, reported_in_one_line():
        programs[program](words_of(words, names))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "usage", "Traceback"))]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert named in lines[0]
    assert not list(tmp_path.iterdir()), "a folder is left"


def test_there_are_as_many_rows_as_were_tried():
    assert len(ROWS) >= 250 and len(set(ROWS)) == len(ROWS)
