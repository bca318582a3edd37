"""benchmarks/report.py, and how benchmarks end where they cannot measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.arguments import use_device
from benchmarks.report import Report, environment
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
