"""The FP32 route for BF16 products gives what BF16 hardware gives: FP32 accumulation, one rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.backends import cpu_bfloat16
from training.backends.cpu_bfloat16 import use_fast_bfloat16


@pytest.fixture(autouse=True, scope="module")
def fast_bfloat16():
    was_there = cpu_bfloat16._library is not None
    use_fast_bfloat16()
    yield
    if not was_there:  # other tests of this process compute with PyTorch's own kernels
        cpu_bfloat16._library._destroy()
        cpu_bfloat16._library = None


def close(actual: torch.Tensor, expected_fp64: torch.Tensor) -> None:
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected_fp64, rtol=2**-8, atol=1e-3)


def test_products_of_bf16_tensors_are_rounded_once():
    a, b, c = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 64, 6).bfloat16(), torch.randn(6).bfloat16()
    close(a[0] @ b[0], a[0].double() @ b[0].double())
    close(torch.bmm(a, b), a.double() @ b.double())
    close(F.linear(a, b[0].T, c), a.double() @ b[0].double() + c.double())
    close(torch.baddbmm(c.expand(2, 8, 6), a, b, beta=0.5), a.double() @ b.double() + 0.5 * c.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_and_their_gradients_are_those_of_each_group(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(10, 64, dtype=dtype, requires_grad=True), torch.randn(4, 6, 64, dtype=dtype)
    weight.requires_grad_()
    ends = [3, 3, 8, 10]  # the second has no rows
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=torch.tensor(ends, dtype=torch.int32))
    grad = torch.randn_like(y)
    y.backward(grad)
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = slice(start, end)
        for actual, a, b in (
            (y[rows], x[rows], weight[i].t()),
            (x.grad[rows], grad[rows], weight[i]),
            (weight.grad[i], grad[rows].t(), x[rows]),
        ):
            expected = a.double() @ b.double()
            torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_tensors_of_two_dtypes_are_refused_as_by_pytorch(other):
    a, b, c = torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 8, 6).to(other), torch.randn(1, 4, 6).to(other)
    for product in (
        lambda: a[0] @ b[0], lambda: torch.bmm(a, b), lambda: torch.addmm(c[0], a[0], b[0].bfloat16()),
        lambda: torch.baddbmm(c, a, b.bfloat16()),
        lambda: F.grouped_mm(a[0], b, offs=torch.tensor([4], dtype=torch.int32)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match="dtype"):
            product()


def test_fp32_products_are_untouched():
    a, b = torch.randn(8, 64), torch.randn(64, 6)
    out = torch.empty(8, 6)
    torch.mm(a, b, out=out)
    assert torch.equal(a @ b, out) and torch.equal(torch.addmm(torch.zeros(6), a, b), out)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "float"])
def test_attention_gradients_equal_those_of_plain_attention(heads, mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 10, 8, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    keep = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    keep[1, ..., 7:] = False
    keep[1, ..., 0] = True
    attn_mask = {"padding": keep, "float": torch.zeros(2, 1, 10, 10).masked_fill(~keep, -1e4)}.get(mask)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=mask == "causal", enable_gqa=True)
    gradient = torch.randn_like(output)
    actual = torch.autograd.grad(output, (q, k, v), gradient)

    repeat = heads[0] // heads[1]
    scores = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) / 8**0.5
    if mask != "none":
        keep = torch.ones(10, 10, dtype=torch.bool).tril() if mask == "causal" else keep
        scores = scores.masked_fill(~keep, -torch.inf)
    plain = scores.softmax(-1) @ v.repeat_interleave(repeat, 1)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(actual, torch.autograd.grad(plain, (q, k, v), gradient))
