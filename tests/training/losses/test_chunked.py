"""The loss from hidden states against the plain formula, in FP64, through real models and through the Trainer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import make_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from qat import prepare_qat
from training.losses import distillation
from training.losses.chunked import Rows, UnknownHead, attach, chunked_loss, find_head
from training.losses.distillation import HiddenRows, Objective, labelled_rows

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "llama, tied": lambda: make_llama(),
    "llama, untied": lambda: make_llama(tie_word_embeddings=False),
    "gemma 2: capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "granite: divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere: multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "gpt-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 3)


def make_labels(vocabulary: int, batch: int = 2, time: int = 9) -> torch.Tensor:
    labels = torch.randint(vocabulary, (batch, time), generator=torch.Generator().manual_seed(1))
    labels[0, 4:6], labels[1, :3] = -100, -100
    return labels


def plain_loss(student, teacher, targets, weights, temperature):
    """The textbook formula on whole logits."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    kl = (log_q.exp() * (log_q - log_p)).sum() * temperature**2
    return weights["kl"] * kl + weights["ce"] * F.cross_entropy(student, targets, reduction="sum")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [{"ce": 0.0, "kl": 1.0}, {"ce": 0.3, "kl": 0.7}, {"ce": 1.0, "kl": 0.0}], ids=str)
def test_loss_and_gradients_equal_the_plain_formula_in_fp64(weights, temperature):
    labels = make_labels(11)
    n = int((labels[:, 1:] != -100).sum())
    results = []
    for chunked in (True, False):
        torch.manual_seed(0)
        student, teacher = nn.Linear(5, 11).double(), nn.Linear(7, 11).double()
        hidden = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
        said = torch.randn(n, 7, dtype=torch.float64)
        objective = Objective(labels, HiddenRows(said, teacher), weights, temperature)
        if chunked:
            loss = chunked_loss(hidden, objective, student, list(student.parameters()))["loss"]
        else:
            loss = plain_loss(student(hidden), teacher(said), objective.targets, weights, temperature)
        (loss / 7).backward()
        assert not chunked or teacher.weight.grad is None
        results.append((loss.detach(), hidden.grad, student.weight.grad, student.bias.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_models_get_the_loss_and_gradients_that_their_own_logits_give(name):
    torch.manual_seed(0)
    model, teacher = (MODELS[name]().double().eval() for _ in range(2))  # without dropout
    for parameter in teacher.parameters():  # builders with a seed of their own make equal models
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    labels = make_labels(model.config.vocab_size)
    inputs = {"input_ids": labels.clamp_min(0)}
    weights = {"ce": 0.3, "kl": 0.7}

    student_logits, teacher_logits = (labelled_rows(m(**inputs).logits, labels) for m in (model, teacher))
    targets = labels[:, 1:][labels[:, 1:] != -100]
    expected = plain_loss(student_logits, teacher_logits.detach(), targets, weights, 2.0)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    for each in (model, teacher):
        attach(each, head := find_head(each))
    said = HiddenRows(teacher(**inputs, objective=Rows(labels))["rows"].detach(), head.logits)
    loss = model(**inputs, objective=Objective(labels, said, weights, 2.0))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, rtol=1e-5, atol=1e-7)


def test_a_quantized_head_is_trained_through_its_quantizers():
    gradients = []
    for chunked in (True, False):
        model = prepare_qat(make_llama(tie_word_embeddings=False), {nn.Linear: "MXFP4"}, ignore=())
        labels = make_labels(260)
        if chunked:
            attach(model, find_head(model))
            model(input_ids=labels.clamp_min(0), objective=Objective(labels))["loss"].backward()
        else:
            logits = labelled_rows(model(input_ids=labels.clamp_min(0)).logits, labels)
            F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != -100], reduction="sum").backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_frozen_heads_and_batches_without_labels_are_fine():
    model = make_llama()
    attach(model, find_head(model))
    labels = torch.full((2, 5), -100)
    result = model(input_ids=labels.clamp_min(0), objective=Objective(labels))
    result["loss"].backward()
    assert result["loss"] == 0 and result["token_losses"].shape == (0, 1)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # DDP waits for all of them
    model.lm_head.requires_grad_(False)  # tied: the embedding too
    labels = make_labels(260)
    model(input_ids=labels.clamp_min(0), objective=Objective(labels))["loss"].backward()
    assert not model.lm_head.weight.grad.any() and model.model.norm.weight.grad.any()


class _Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_of_a_step_has_a_row_of_logits_for_each_token():
    model, teacher = (make_llama(tie_word_embeddings=False) for _ in range(2))
    labels = torch.randint(260, (4, 100))
    for each in (model, teacher):
        attach(each, find_head(each))
    with _Sizes() as sizes, torch.autocast("cpu", torch.bfloat16):
        said = teacher(input_ids=labels, objective=Rows(labels))["rows"].detach()
        objective = Objective(labels, HiddenRows(said, find_head(teacher).logits), {"kl": 1.0})
        model(input_ids=labels, objective=objective)["loss"].backward()
    assert 0 < sizes.largest < 4 * 99 * 260 / 2  # the logits would be the largest by far


def test_a_model_whose_logits_are_made_in_another_way_is_not_taken_for_a_known_one():
    model = make_llama()
    plain = model.forward

    def odd(**kwargs):
        output = plain(**kwargs)
        output.logits = output.logits.cos()
        return output

    model.forward = odd
    with pytest.raises(UnknownHead, match="LlamaForCausalLM computes its logits in a way that is not known"):
        find_head(model)
    with pytest.raises(UnknownHead, match="no output embedding on top of a base model"):
        find_head(make_llama().model)


@pytest.mark.parametrize("width,tokens", [(64, 512), (576, 512), (2048, 1024), (4096, 2048), (8192, 2048)])
def test_chunks_on_other_devices_grow_with_the_head_whose_gradient_they_cost(monkeypatch, width, tokens):
    monkeypatch.undo()  # the small chunks of this file
    rows = torch.empty(5000, width, device="meta", requires_grad=True)
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return hidden

    objective = Objective(torch.zeros(1, 5001, dtype=torch.long))
    objective.token_losses = lambda logits, part: logits[:, :1]
    parameter = torch.empty(1, device="meta", requires_grad=True)
    chunked_loss(rows, objective, lambda hidden: head(hidden) * parameter, [parameter])
    assert max(seen) == tokens
    seen.clear()
    chunked_loss(rows, objective, head, [])  # a frozen head has no gradient to gather
    assert max(seen) == 512


def test_an_evaluation_computes_no_gradient_of_the_head():
    head, modes = nn.Linear(4, 7), []

    def watched(hidden):
        modes.append(torch.is_grad_enabled())
        return head(hidden)

    rows, objective = torch.randn(5, 4, requires_grad=True), Objective(torch.randint(7, (1, 6)))
    with torch.no_grad():
        evaluated = chunked_loss(rows, objective, watched, [*head.parameters()])
    trained = chunked_loss(rows, objective, watched, [*head.parameters()])
    assert modes == [False, False, True, True]
    assert not evaluated["loss"].requires_grad and torch.equal(evaluated["loss"], trained["loss"])


def test_autocast_keeps_no_copy_of_the_hidden_states_of_earlier_parts():
    """It keeps those of leaves until it ends, for weights that are used again."""
    head, labels = torch.nn.Linear(8, 50), make_labels(50)
    rows = torch.randn(int((labels[:, 1:] != -100).sum()), 8, requires_grad=True)
    inputs = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        inputs.append(hidden.is_leaf)
        return head(hidden)

    with torch.autocast("cpu", torch.bfloat16):
        chunked_loss(rows, Objective(labels), logits, list(head.parameters()))
    assert len(inputs) > 2 and not any(inputs)
