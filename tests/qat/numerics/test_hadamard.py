"""Products with a Hadamard matrix: a definition by matrices, kernels against plain PyTorch, and the operator."""

from __future__ import annotations

import pytest
import torch

from qat.numerics import hadamard, ops
from qat.numerics.kernels import HADAMARD, triton_hadamard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wide(rows: int = 70, columns: int = 96) -> torch.Tensor:
    """Blocks of many magnitudes, zeros, an infinity and a NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-140, 120, (rows, columns // 32), generator=generator)).repeat_interleave(32, 1)
    x[3], x[4, 5], x[5, 40] = 0, torch.inf, torch.nan
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def test_it_is_the_product_with_sylvesters_matrix_over_the_root_of_32():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    expected = torch.from_numpy(scipy_linalg.hadamard(32)).double()
    assert torch.equal(hadamard.matrix(dtype=torch.float64), expected)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    product = (x.double().view(-1, 32) @ expected / 32**0.5).view(50, 64)
    torch.testing.assert_close(hadamard.transform(x, torch.float32).double(), product, rtol=0, atol=2e-6)
    torch.testing.assert_close(hadamard.transform(hadamard.transform(x, torch.float32), torch.float32), x)


def test_of_bf16_values_it_is_the_product_of_matrices_bit_for_bit():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    product = x.double().view(-1, 32) @ hadamard.matrix(dtype=torch.float64)
    quotient = product.float() / torch.tensor(32.0).sqrt()
    assert same(hadamard.transform(x, torch.bfloat16), quotient.view(400, 64).bfloat16())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_the_device_has_the_same_bits(stored, dtype):
    kernels = triton_hadamard if triton_hadamard.is_available() else HADAMARD["cpu"]
    if not kernels.is_available():
        pytest.skip("no compiler")
    x = wide().to(stored)
    for values in (x, x[:, :32], x.view(2, 35, 96), x[:0]):
        assert same(kernels.transform(values.to(DEVICE), dtype).cpu(), hadamard.transform(values, dtype))


def test_the_gradient_is_transformed_too():
    x = torch.randn(3, 64, dtype=torch.float32, requires_grad=True)
    grad = torch.randn(3, 64).bfloat16()
    ops.transform(x, torch.bfloat16).backward(grad)
    assert same(x.grad, hadamard.transform(grad, torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(), (4, 33)])
def test_rows_that_are_no_blocks_are_refused(shape):
    for transform in (hadamard.transform, HADAMARD["cpu"].transform, ops.transform):
        with pytest.raises(ValueError, match="blocks of 32"):
            transform(torch.zeros(shape), torch.float32)
