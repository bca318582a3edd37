"""Steps that share a model compute what they are called."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.variants import BF16, Variants
from benchmarks.workloads import make_batch, make_model


def test_a_compiled_variant_computes_with_its_own_graph_after_others_ran_several_times(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = make_model("tiny", "MXFP4", 1, "cpu")
    variants = Variants(model, "MXFP4", make_batch(model, 1, 32), compiled=True)
    expected = {}
    for name in variants.names:
        variants._become(name)
        expected[name] = float(variants.step.loss())
    assert expected[BF16] != pytest.approx(expected["MXFP4"], rel=1e-5)
    for name in (BF16, BF16, BF16, "MXFP4", "MXFP4", BF16, "MXFP4"):
        variants._become(name)
        assert float(variants.steps[name].loss()) == pytest.approx(expected[name], rel=1e-6), name
