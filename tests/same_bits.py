"""Kernels and plain functions give the same bits."""

from __future__ import annotations

import pytest
import torch

from qat.numerics.kernels import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpu_kernels = pytest.mark.skipif(not cpu.is_available(), reason="the CPU kernels need a C++ compiler")


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bits; NaNs may carry any payload and sign."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = actual.cpu().contiguous(), expected.contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    different = actual.view(integer) != expected.view(integer)
    if actual.is_floating_point():
        different &= ~(actual.isnan() & expected.isnan())
    where = different.nonzero()
    assert len(where) == 0, f"{len(where)} elements differ, first at {where[0].tolist()}"
