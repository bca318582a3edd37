"""Loss and perplexity against a direct computation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from helpers import make_llama
from transformers import EvalPrediction

from training.losses.metrics import get_metrics_with_perplexity, loss_over_tokens, token_loss_sums


def test_loss_is_the_mean_over_tokens_whatever_the_batches():
    logits, labels = torch.randn(4, 9, 7), torch.randint(0, 7, (4, 9))
    labels[0, 3:] = -100
    labels[2, :8] = -100
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=-100)
    for split in ([4], [1, 3], [2, 2]):
        sums = [token_loss_sums(x, y) for x, y in zip(logits.split(split), labels.split(split), strict=True)]
        nll, tokens = (torch.cat(parts).numpy() for parts in zip(*sums, strict=True))
        metrics = loss_over_tokens(EvalPrediction(nll, tokens))
        assert math.isclose(metrics["loss"], expected.item(), rel_tol=1e-6)
        assert math.isclose(metrics["perplexity"], math.exp(expected.item()), rel_tol=1e-6)


def test_loss_equals_the_models_own():
    model, ids = make_llama(), torch.randint(0, 260, (1, 20))
    output = model(input_ids=ids, labels=ids)
    nll, tokens = token_loss_sums(output.logits, ids)
    torch.testing.assert_close(nll.sum() / tokens.sum(), output.loss)


def test_perplexity_stands_beside_each_evaluation_loss_and_overflows_to_infinity():
    given = {"eval_loss": 1.0, "eval_a_loss": 1e6, "train_loss": 2.0, "eval_runtime": 3.0}
    metrics = get_metrics_with_perplexity(given)
    assert metrics["eval_perplexity"] == math.e and metrics["eval_a_perplexity"] == math.inf
    assert set(metrics) - set(given) == {"eval_perplexity", "eval_a_perplexity"}
