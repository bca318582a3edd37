"""The kernels on a GPU, or in Triton's interpreter, against plain PyTorch and the formulas in FP64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.losses import distillation, triton_losses
from training.losses.chunked import chunked_loss
from training.losses.distillation import HiddenRows, Objective, forward_kl, sparse_cross_entropy

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SERVED = triton_losses.serves(torch.zeros(1, 1, device=DEVICE))
needs_kernels = pytest.mark.skipif(not SERVED, reason="neither a GPU with Triton nor TRITON_INTERPRET=1")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a gradient, once
WEIGHTS = torch.tensor([1.0, 0.0, -3.0, 0.5, 7.0], device=DEVICE)
LOSSES = ("kl", "ce")


def logits(dtype: torch.dtype, vocabulary: int, seed: int, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * 4).to(DEVICE, dtype)


def ids(vocabulary: int) -> torch.Tensor:
    return torch.tensor([0, 3, 6, vocabulary - 1, 1], device=DEVICE)


def computed(loss: str, student, teacher, temperature: float = 1.0):
    """Losses and the gradient of their weighted sum, as a trainer gets them."""
    student = student.detach().requires_grad_()
    if loss == "kl":
        result = forward_kl(student, teacher, temperature)
    else:
        result = sparse_cross_entropy(student, ids(student.shape[1])[:, None], temperature=temperature)
    (result * WEIGHTS).sum().backward()
    return result.detach(), student.grad


def exact(loss: str, student, teacher, temperature: float):
    """In FP64, and a bound of the FP32 error of a gradient: p and q have relative errors of some u (2 + |log p|)."""
    student = student.detach().double().requires_grad_()
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student, teacher.double()))
    if loss == "kl":
        result = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        result = F.nll_loss(log_p, ids(student.shape[1]), reduction="none")
    (result * temperature**2 * WEIGHTS).sum().backward()
    terms = [log_p.detach(), *[log_q] * (loss == "kl")]
    bound = sum(x.exp() * (2 - x) for x in terms) * 2**-22 * temperature * WEIGHTS.abs()[:, None]
    return result.detach() * temperature**2, student.grad, bound


@pytest.fixture
def plain(monkeypatch):
    """What the plain formulas give."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(triton_losses, "serves", lambda *_: False)
            return computed(*args)

    return run


@needs_kernels
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("vocabulary", "temperature"), [(7, 1.0), (2048, 2.5), (5000, 1.0), (5000, 0.7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_are_those_of_the_formula_in_fp64(loss, dtype, vocabulary, temperature):
    student, teacher = logits(dtype, vocabulary, 0), logits(dtype, vocabulary, 1)
    result, gradient = computed(loss, student, teacher, temperature)
    expected, exact_gradient, bound = exact(loss, student, teacher, temperature)
    assert result.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)
    bound += ROUNDING[dtype] * exact_gradient.abs() + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((gradient.double() - exact_gradient).abs() <= bound).all()
    assert not gradient[1].any()  # its weight is zero


@needs_kernels
@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_not_larger_than_those_of_the_plain_formulas(loss, plain):
    teacher = logits(torch.float32, 5000, 1) + 100  # as many models' logits lie, far from zero
    student = (teacher + logits(torch.float32, 5000, 0) / 100).to(torch.bfloat16)
    args = loss, student, teacher.to(torch.bfloat16), 1.0
    expected = exact(*args)[:2]
    for mine, theirs, right in zip(computed(*args), plain(*args), expected, strict=True):
        ours, others = ((x.double() - right).norm() / right.norm() for x in (mine, theirs))
        assert ours <= 1.05 * others


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_are_finite_where_those_of_the_plain_formulas_are(loss, whose, value, plain):
    student, teacher = logits(torch.bfloat16, 2500, 0), logits(torch.bfloat16, 2500, 1)
    changed = student if whose == "student" else teacher
    changed[0, 2400], changed[3, :] = value, value
    for mine, theirs in zip(computed(loss, student, teacher), plain(loss, student, teacher), strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        assert torch.equal(mine.isnan(), theirs.isnan())
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-6, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("loss", LOSSES)
def test_strided_logits_and_a_teacher_of_another_dtype_are_taken_as_they_are(loss):
    student, teacher = logits(torch.bfloat16, 80, 0).t()[:40].t(), logits(torch.float32, 40, 1)
    assert not student.is_contiguous()
    expected = computed(loss, student.contiguous(), teacher)
    for mine, theirs in zip(computed(loss, student, teacher), expected, strict=True):
        assert torch.equal(mine, theirs)


@needs_kernels
def test_no_rows_give_no_losses_and_no_gradient():
    student = torch.zeros(0, 9, device=DEVICE, requires_grad=True)
    result = forward_kl(student, student.detach()) + sparse_cross_entropy(student, torch.zeros(0, 1, dtype=torch.long))
    result.sum().backward()
    assert result.shape == (0,) and student.grad.shape == (0, 9)


@needs_kernels
@pytest.mark.parametrize("label", [-100, -1, 9, 2**31])
def test_a_label_that_is_no_token_makes_its_row_nan(label):
    student = logits(torch.float32, 9, 0, rows=2).requires_grad_()
    result = triton_losses.CrossEntropy.apply(student, torch.tensor([label, 4], device=DEVICE), 1.0)
    result.sum().backward()
    assert result.isnan().tolist() == [True, False]
    assert student.grad.isnan().all(1).tolist() == [True, False]


@needs_kernels
@pytest.mark.parametrize("loss", LOSSES)
def test_two_computations_have_the_same_bits_with_a_gradient_and_without(loss):
    args = loss, logits(torch.bfloat16, 3000, 0), logits(torch.bfloat16, 3000, 1)
    first, again = computed(*args), computed(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        without = forward_kl(*args[1:]) if loss == "kl" else sparse_cross_entropy(args[1], ids(3000)[:, None])
    assert torch.equal(without, first[0])


@needs_kernels
def test_a_chunked_loss_ignores_tokens_without_a_label(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 2)
    labels = torch.tensor([[5, -100, 7, -100, 8, 3]], device=DEVICE)
    student, teacher = (logits(torch.float32, 11, seed, rows=3) for seed in (0, 1))
    results = []
    for served in (True, False):
        monkeypatch.setattr(triton_losses, "serves", triton_losses.serves if served else lambda *_: False)
        rows = student.clone().requires_grad_()
        losses = chunked_loss(rows, Objective(labels, HiddenRows(teacher), {"ce": 0.25, "kl": 0.75}, 2.0))
        losses["loss"].backward()
        results.append((losses["loss"].detach(), losses["token_losses"], rows.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_other_logits_are_left_to_the_plain_formulas(monkeypatch):
    monkeypatch.setattr(triton_losses, "interpreting", lambda: True)
    monkeypatch.setattr(triton_losses, "triton", object())
    good, half = torch.zeros(2, 6), torch.zeros(2, 6).half()
    assert triton_losses.serves(good, half) and triton_losses.serves(good)
    assert not triton_losses.serves(good.double())
    assert not triton_losses.serves(good, torch.zeros(2, 5))
    assert not triton_losses.serves(good, torch.zeros(2, 6, device="meta"))
    assert not triton_losses.serves(torch.nn.Parameter(good))
    monkeypatch.setattr(triton_losses, "triton", None)
    assert not triton_losses.serves(good)
    monkeypatch.undo()
    assert triton_losses.interpreting() or not triton_losses.serves(good)  # a CPU's tensors
