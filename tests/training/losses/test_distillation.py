"""Forward KL against a direct computation, and who may teach whom."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import make_llama, make_tokenizer

from training.losses import distillation
from training.losses.distillation import forward_kl, labelled_rows, sparse_cross_entropy
from training.teachers.load import check_teacher


def direct_kl(student, teacher, temperature):
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [3, 512])
def test_forward_kl_and_its_gradient_equal_the_direct_computation(monkeypatch, temperature, chunk):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    student, teacher = (torch.randn(10, 17, generator=torch.Generator().manual_seed(i)) for i in range(2))
    weights, results = torch.rand(10), []
    for function in (forward_kl, direct_kl):
        logits = student.clone().requires_grad_()
        kl = function(logits, teacher, temperature)
        (kl * weights).sum().backward()
        results.append((kl.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient():
    logits = torch.randn(4, 9).bfloat16().requires_grad_()
    kl = forward_kl(logits, logits.detach())
    kl.sum().backward()
    assert kl.abs().max() < 1e-6 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [3, 512])
def test_sparse_cross_entropy_and_its_gradient_equal_those_with_whole_targets(monkeypatch, temperature, chunk):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    logits, weights = torch.randn(10, 17), torch.rand(10, 4)
    ids = torch.randint(0, 17, (10, 4))
    ids[:, 1] = ids[:, 0]  # a token that occurs twice
    whole = torch.zeros(10, 17).scatter_add(1, ids, weights)
    sparse, direct = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = sparse_cross_entropy(sparse, ids, weights, temperature)
    expected = F.cross_entropy(direct / temperature, whole, reduction="none") * temperature**2
    torch.testing.assert_close(ours, expected)
    (ours * logits[:, 0]).sum().backward()
    (expected * logits[:, 0]).sum().backward()
    torch.testing.assert_close(sparse.grad, direct.grad)


@pytest.mark.parametrize("weight", [0.2, 0.7])
def test_a_term_counts_by_its_weight_and_not_by_that_rounded_to_bfloat16(weight):
    logits, targets = torch.zeros(64, 3).bfloat16().requires_grad_(), torch.zeros(64, 1, dtype=torch.long)
    (sparse_cross_entropy(logits, targets) * torch.tensor(weight)).sum().backward()
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3]).bfloat16().float() * weight
    torch.testing.assert_close(logits.grad[0], expected.bfloat16(), rtol=0, atol=0)


def test_a_gradient_that_is_scaled_in_place_is_not_given_twice(monkeypatch):
    monkeypatch.setattr(distillation.triton_losses, "serves", lambda *_: False)
    logits = torch.randn(4, 9, requires_grad=True)
    loss = forward_kl(logits, torch.randn(4, 9)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_are_those_before_a_labelled_token():
    logits = torch.arange(2 * 4).reshape(2, 4, 1)
    labels = torch.tensor([[5, -100, 7, 8], [-100, 6, -100, -100]])
    assert labelled_rows(logits, labels).flatten().tolist() == [1, 2, 4]


def test_a_teacher_with_another_vocabulary_or_tokenizer_is_refused():
    student, teacher = make_llama(), make_llama()
    check_teacher(student, teacher, make_tokenizer(), make_tokenizer())
    other = make_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="'<extra>'"):
        check_teacher(student, teacher, make_tokenizer(), other)
    teacher.config.vocab_size += 1
    with pytest.raises(ValueError, match="vocabulary of 261 tokens, the student of 260"):
        check_teacher(student, teacher)
