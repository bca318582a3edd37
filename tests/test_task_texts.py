"""benchmarks/tasks/texts.py: bits per byte and KL of a text."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from helpers import make_llama, make_tokenizer

from benchmarks.tasks.texts import bits_per_byte, read_text
from qat.errors import UserError

TEXT = "Sparse is better than dense. " * 8


def test_bits_per_byte_are_the_models_likelihood_over_the_bytes_that_it_predicts():
    model, tokenizer = make_llama().eval(), make_tokenizer()
    found = bits_per_byte(model, tokenizer, TEXT, length=32, batch_size=3)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    log_p = model(rows).logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])
    assert found["bits_per_byte"] == pytest.approx(-log_p.mean().item() / math.log(2), rel=1e-5)  # a token is a byte
    assert 0 < found["error"] < 0.1 and "kl" not in found


def test_kl_is_zero_to_itself_and_torchs_to_another_model():
    model, tokenizer = make_llama().eval(), make_tokenizer()
    other = deepcopy(model)
    other.lm_head.weight.data *= 1.5
    assert bits_per_byte(model, tokenizer, TEXT, 32, teacher=model)["kl"] == pytest.approx(0, abs=1e-7)
    found = bits_per_byte(model, tokenizer, TEXT, 32, teacher=other, limit=2)["kl"]
    rows = torch.tensor(tokenizer(TEXT)["input_ids"])[:64].reshape(2, 32)
    own, theirs = (m(rows).logits[:, :-1].log_softmax(-1) for m in (model, other))
    wanted = torch.nn.functional.kl_div(own, theirs, reduction="sum", log_target=True) / 62
    assert found == pytest.approx(wanted.item(), rel=1e-4)


def test_a_text_that_is_missing_or_short_is_one_line(tmp_path):
    with pytest.raises(UserError, match="fetch.py --out"):
        read_text("text_never", tmp_path)
    with pytest.raises(UserError, match="5 tokens, fewer than a row of 32"):
        bits_per_byte(make_llama(), make_tokenizer(), "short", 32)
