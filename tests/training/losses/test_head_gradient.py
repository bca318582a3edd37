"""The gradient of a head summed over parts: by products of a matrix, and by autograd for any other head."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import make_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qat import prepare_qat
from training.losses import chunked, distillation, head_gradient
from training.losses.chunked import Head, attach, find_head
from training.losses.distillation import Objective
from training.losses.head_gradient import GradientSums, MatrixHead, MatrixSum, is_matrix

DEVICES = ("cpu", *["cuda"] * torch.cuda.is_available())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 3)
    monkeypatch.setattr(chunked, "_chunk_size", lambda *_: 3)


def gradients(head: Head, rows: torch.Tensor, dtype: torch.dtype | None, labels: torch.Tensor) -> list[torch.Tensor]:
    head.module.zero_grad()
    rows = rows.detach().requires_grad_()
    with torch.autocast(rows.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = head.loss(rows, Objective(labels))["loss"]
    (loss / 7).backward()
    return [loss.detach(), rows.grad, *(p.grad for p in head.module.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_products_that_add_to_the_sum_give_the_gradients_of_autograd(device, dtype, monkeypatch):
    torch.manual_seed(0)
    head = Head(nn.Linear(16, 40, bias=False, device=device))
    rows, labels = torch.randn(11, 16, device=device), torch.randint(40, (1, 12), device=device)
    ours = gradients(head, rows, dtype, labels)
    monkeypatch.setattr(chunked, "is_matrix", lambda *_: False)
    for mine, plain in zip(ours, gradients(head, rows, dtype, labels), strict=True):
        assert mine.dtype == plain.dtype == torch.float32
        # On a GPU a part's gradient is not rounded to BF16 first.
        torch.testing.assert_close(
            mine, plain, rtol=0 if device == "cpu" else 1e-2, atol=0 if device == "cpu" else 1e-3
        )


def test_the_sum_over_parts_is_the_product_of_all_in_fp64():
    torch.manual_seed(0)
    weight, hidden = (torch.randn(n, 6, dtype=torch.float64) for n in (9, 8))
    sums = MatrixSum(MatrixHead(weight, lambda logits: logits * 2), needed=True)
    grad = torch.randn(8, 9, dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
        inputs = hidden[part].requires_grad_()
        logits = sums.head(inputs)
        (of_inputs,) = torch.autograd.grad(logits, inputs, grad[part])
        torch.testing.assert_close(logits, 2 * hidden[part] @ weight.t())
        torch.testing.assert_close(of_inputs, 2 * grad[part] @ weight)
    (total,) = sums.take()
    torch.testing.assert_close(total, 2 * grad.t() @ hidden)


def test_a_head_that_does_more_than_multiply_is_left_to_autograd():
    plain, biased = nn.Linear(4, 7, bias=False), nn.Linear(4, 7)
    wrapped = nn.Linear(4, 7, bias=False)
    wrapped.forward = lambda hidden: hidden @ wrapped.weight.t() * 2
    quantized = prepare_qat(make_llama(tie_word_embeddings=False), {nn.Linear: "MXFP4"}, ignore=()).lm_head
    taken = [is_matrix(module, module.forward) for module in (plain, biased, wrapped, quantized, nn.Identity())]
    assert taken == [True, False, False, False, False]


def test_gradients_that_are_one_tensor_are_summed_apart():
    a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
    sums = GradientSums([a, b], lambda rows: rows * (a + b))
    for value in (1.0, 2.0, 3.0):
        sums.add(list(torch.autograd.grad(sums.head(torch.full((2,), value)).sum(), [a, b])))
    assert [total.tolist() for total in sums.take()] == [[6.0, 6.0], [6.0, 6.0]]


def test_a_head_alone_is_trained_on_hidden_states_that_need_no_gradient():
    head, labels = Head(nn.Linear(4, 7, bias=False)), torch.randint(7, (1, 9))
    rows = torch.randn(8, 4)
    head.loss(rows, Objective(labels))["loss"].backward()
    weight = head.module.weight.detach().requires_grad_()
    expected = nn.functional.cross_entropy(rows @ weight.t(), labels[0, 1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(head.module.weight.grad, weight.grad)


def test_the_sum_is_the_only_fp32_tensor_of_the_weights_size():
    model = make_llama(tie_word_embeddings=False)
    attach(model, find_head(model))
    weight, made = model.lm_head.weight, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == weight.shape and result.dtype == torch.float32:
                made.extend([function] * (not function.is_view and not function._schema.is_mutable))
            return result

    rows, labels = torch.randn(1, 12, weight.shape[1], requires_grad=True), torch.randint(260, (1, 12))
    with Watch(), torch.autocast("cpu", torch.bfloat16):
        model.lm_head(rows, Objective(labels))["loss"].backward()
    assert made == [torch.ops.aten.new_empty.default]


def test_the_weight_as_products_see_it_is_freed_with_the_loss_without_a_garbage_collection(monkeypatch):
    made, init = [], MatrixSum.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(weakref.ref(self.seen))

    monkeypatch.setattr(MatrixSum, "__init__", noted)
    head, labels = Head(nn.Linear(4, 7, bias=False)), torch.randint(7, (1, 9))
    gc.disable()
    try:
        gradients(head, torch.randn(8, 4), torch.bfloat16, labels)
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_products_that_refuse_fp32_or_round_are_not_used(monkeypatch):
    cpu = torch.device("cpu")
    assert "aten::mm.dtype_out" in head_gradient.why_not_fp32(cpu, torch.bfloat16)  # a CPU has none
    assert not head_gradient.writes_fp32(cpu, torch.bfloat16)

    def product(total, left, right, is_first):
        made = left.float() @ right.float()
        total.copy_(made if is_first else total + made)

    monkeypatch.setattr(head_gradient, "_product_to", product)
    assert head_gradient.why_not_fp32(cpu, torch.bfloat16) is None

    def rounded(total, left, right, is_first):
        product(total, left, right, is_first)
        total.copy_(total.half())

    monkeypatch.setattr(head_gradient, "_product_to", rounded)
    assert "rounded" in head_gradient.why_not_fp32(cpu, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_this_gpu_adds_products_to_fp32(dtype):
    assert head_gradient.why_not_fp32(torch.device("cuda"), dtype) is None
