"""Operators that are called without the dispatcher are seen by everything that has to see them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qat.numerics import ops


def weights(*shape: int) -> torch.Tensor:
    return torch.linspace(-3, 3, 2 * 4 * 32).view(*shape).to(torch.bfloat16)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return ops.fake_quantize(x, "mxfp4", "floor", torch.bfloat16)


@torch.no_grad()
def test_a_trace_has_the_operator_and_not_the_values_of_one_call():
    graph = make_fx(rounded)(weights(8, 32))
    assert torch.ops.mx_qat.fake_quantize.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(-2 * weights(8, 32)), rounded(-2 * weights(8, 32)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mapped_function_rounds_and_merges_each_part():
    w, a, b = weights(2, 4, 32), torch.ones(2, 1, 32), torch.ones(2, 4, 1)
    assert torch.equal(torch.func.vmap(rounded)(w), rounded(w))
    mapped = torch.func.vmap(lambda *each: ops.merge(*each, 0.5))(w, a, b)
    assert torch.equal(mapped, ops.merge(w, a, b, 0.5))


@torch.no_grad()
def test_tensors_without_values_stay_without():
    assert rounded(weights(8, 32).to("meta")).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(rounded(weights(8, 32))) is FakeTensor
        merged = ops.merge(weights(8, 32), torch.ones(1, 32), torch.ones(8, 1), 1.0)
    assert type(merged) is FakeTensor


def test_inference_mode_has_the_same_values():
    with torch.inference_mode():
        seen = rounded(weights(8, 32))
    assert torch.equal(seen, rounded(weights(8, 32)))
