"""A compiled kernel is called directly where Triton would have chosen it again, and with the same arguments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qat.numerics.kernels import triton_launch
from qat.numerics.kernels.triton_launch import launch


class Kernel:
    """Stands for a kernel with three tensors, an integer and constants; notes each call."""

    def __init__(self) -> None:
        names = ("a", "b", "c", "count", "WIDTH", "VIEW", "TOP")
        defaults = {"TOP": 7}
        self.params = [SimpleNamespace(name=name, default=defaults.get(name)) for name in names]
        self.bound: list[tuple] = []
        self.direct: list[tuple] = []

    def __getitem__(self, grid):
        def bind(*args, **options):
            self.bound.append((grid, args, options))
            return _Compiled(self, len(self.bound))

        return bind


class _Compiled:
    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.direct.append((self.number, grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_launch, "interpreting", lambda: False)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says of CPU tensors
    return Kernel()


def tensors(dtype=torch.float32, offset=0):
    return tuple(torch.zeros(64, dtype=dtype)[offset:] for _ in range(3))


def test_the_second_launch_calls_what_the_first_compiled_with_all_constants_in_order(kernel):
    for count in (32, 48):
        launch(kernel, (5,), tensors(), count, WIDTH=8, VIEW="bf16", num_warps=2)
    given = tensors()
    launch(kernel, (9, 2), given, 64, WIDTH=8, VIEW="bf16", num_warps=2)
    assert [options for _, _, options in kernel.bound] == [
        {"WIDTH": 8, "VIEW": "bf16", "num_warps": 2, "enable_fp_fusion": False}
    ]
    (number, grid, args) = kernel.direct[-1]
    assert (number, grid, args[3:]) == (1, (9, 2, 1), (64, 8, "bf16", 7))
    assert all(ours is theirs for ours, theirs in zip(args[:3], given, strict=True))
    assert len(kernel.direct) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((tensors(), 32, 8), (tensors(torch.bfloat16), 32, 8)),
        ((tensors(), 32, 8), (tensors(), 33, 8)),
        ((tensors(), 33, 8), (tensors(), 1, 8)),
        ((tensors(), 32, 8), (tensors(), 2**31, 8)),
        ((tensors(), -(2**31), 8), (tensors(), 2**31, 8)),
        ((tensors(), 2**62, 8), (tensors(), 2**63, 8)),
        ((tensors(), 32, 8), (tensors(), 32, 16)),
        ((tensors(), 32, 8), (tensors(), 32.0, 8)),
    ],
    ids=["dtype", "multiple of 16", "one", "width", "sign", "unsigned", "constant", "float"],
)
def test_what_triton_compiles_for_is_compiled_again(kernel, first, second):
    for given, count, width in (first, second, first, second):
        launch(kernel, (1,), given, count, WIDTH=width, VIEW=None)
    assert len(kernel.bound) == 2
    assert [number for number, _, _ in kernel.direct] == [1, 2]


def test_tensors_that_are_not_aligned_are_bound_by_triton(kernel):
    launch(kernel, (1,), tensors(), 32, WIDTH=8, VIEW=None)
    for _ in range(2):
        launch(kernel, (1,), tensors(offset=1), 32, WIDTH=8, VIEW=None)
    assert (len(kernel.bound), kernel.direct) == (3, [])


def test_each_call_is_bound_by_triton_where_it_compiles_for_the_size_of_memory(kernel, monkeypatch):
    monkeypatch.setattr(triton_launch, "_BINDS_EACH_CALL", True)
    for _ in range(2):
        launch(kernel, (1,), tensors(), 32, WIDTH=8, VIEW=None)
    assert (len(kernel.bound), kernel.direct) == (2, [])


def test_a_kernel_is_compiled_for_tensors_as_it_sees_them(kernel):
    given = (*tensors(torch.uint8)[:2], torch.zeros(4, dtype=torch.float8_e4m3fn))
    launch(kernel, (1,), given, 32, views={1: torch.int32}, WIDTH=8, VIEW=None)
    assert [tensor.dtype for tensor in kernel.bound[0][1][:3]] == [torch.uint8, torch.int32, torch.uint8]
