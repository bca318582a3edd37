"""benchmarks/report.py, the arguments of benchmarks, and how these end where they cannot measure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.arguments import chosen, use_device
from benchmarks.report import Report, environment
from qat.command_line import OneLineParser, not_negative_number, positive_number
from qat.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("begin", [environment, use_device, lambda device: Report("name", device)])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_measured(monkeypatch, begin):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        begin("cuda")


def test_every_benchmark_reports_its_user_errors_in_one_line():
    programs = [path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(programs) > 15
    assert not [p.name for p in programs if "with reported_in_one_line():" not in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", ""])
def test_a_number_that_measures_nothing_is_refused_by_name_and_value(text, capsys):
    parser = OneLineParser()
    parser.add_argument("--sizes", type=positive_number, nargs="+")
    with pytest.raises(SystemExit):
        parser.parse_args(["--sizes", "1", text])
    assert capsys.readouterr().err == f"error: --sizes {text!r} is not a number above 0\n"
    assert parser.parse_args(["--sizes", "0.1"]).sizes == [0.1]


def test_a_number_that_may_be_zero_is_finite_and_not_negative():
    assert not_negative_number("0") == 0.0
    for text in ("-0.1", "nan", "inf"):
        with pytest.raises(ValueError):
            not_negative_number(text)


def test_every_number_of_a_benchmark_has_a_range():
    found = {
        p.name: re.findall(r"type=(?:int|float)\b", p.read_text(encoding="utf-8")) for p in BENCHMARKS.glob("*.py")
    }
    assert not {name: numbers for name, numbers in found.items() if numbers}


def test_an_unknown_name_in_a_list_of_names_is_refused_with_the_choices():
    assert chosen("--runs", "b,a", ("a", "b")) == ["b", "a"]
    for text in ("a,x", ",", ""):
        with pytest.raises(UserError, match=f"--runs '{text}': .*choose from a, b"):
            chosen("--runs", text, ("a", "b"))


def test_what_is_timed_as_a_graph_waits_for_the_stream_that_made_its_tensors(monkeypatch):
    """Triton's bench begins on a stream that does not; memory that the first stream still reads may be its target."""
    from benchmarks import gpu

    called = []
    testing = SimpleNamespace(do_bench_cudagraph=lambda *_, **__: called.append("timed") or 1000.0)
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(testing=testing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: called.append("waited"))
    assert gpu.graph_seconds(lambda: None) == 1.0 and called == ["waited", "timed"]
