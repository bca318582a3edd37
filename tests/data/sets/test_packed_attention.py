"""Attention within the samples of packed rows: equal to a mask, without the mask."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from helpers import Shapes, make_llama, make_mixture
from transformers import MistralConfig, MistralForCausalLM

from data.sets import packed_attention
from data.sets.packed_attention import NAME, Borders, attend_within_samples, sample_by_sample

TOKENS = 40


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows: samples of 7, 1, 12 and 20 tokens, and of 40."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((7, 1, 12, 20), (TOKENS,))]
    return {"input_ids": torch.arange(2 * TOKENS).view(2, -1) * 13 % 260, "position_ids": torch.stack(positions)}


def results(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the batch, and the gradient of a projection."""
    model.zero_grad()
    logits = model(**packed_batch(), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


def mistral(window: int | None):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize(
    "make", [make_llama, make_mixture, lambda: mistral(None), lambda: mistral(5)], ids=["llama", "experts", "m", "sw"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_the_mask(make, checkpointing):
    model = make().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = results(model)
    assert attend_within_samples(model) and model.config._attn_implementation == NAME and model.training
    for found, value in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_tokens_by_tokens_is_made():
    model = make_llama()
    for quadratic in (True, False):
        with Shapes() as shapes, torch.no_grad():
            model(**packed_batch(), use_cache=False)
        assert any(shape[-2:] == (TOKENS, TOKENS) for shape in shapes.seen) is quadratic
        attend_within_samples(model)


def test_padded_samples_and_caches_are_left_to_sdpa():
    model = make_llama().eval()
    ids, mask = torch.arange(20).view(2, 10) + 5, torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    expected = [model(ids, attention_mask=mask).logits, model.generate(ids[:1], max_new_tokens=4, do_sample=False)]
    assert attend_within_samples(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected[0], rtol=0, atol=0)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), expected[1])


def test_a_model_with_another_attention_keeps_it():
    model = make_llama()
    model.set_attn_implementation("eager")
    assert not attend_within_samples(model) and model.config._attn_implementation == "eager"


def test_a_model_that_loses_positions_on_the_way_keeps_the_mask():
    model = make_llama()
    for layer in model.model.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, attend=attend, position_ids=None, **kwargs: attend(*args, **kwargs)
    assert not attend_within_samples(model) and model.config._attn_implementation == "sdpa"


def test_the_attention_is_not_saved_with_the_model(tmp_path):
    model = make_llama()
    attend_within_samples(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_borders_are_where_a_position_does_not_follow_the_one_before():
    borders = Borders.of(packed_batch()["position_ids"])
    assert borders.on_host == borders.edges.tolist() == [0, 7, 8, 20, 40, 80]
    assert (borders.samples, borders.longest, borders.rows) == (5, 40, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_call_for_all_samples_computes_what_a_call_a_sample_does():
    from data.sets.packed_attention import with_lengths

    torch.manual_seed(0)
    borders = Borders.of(packed_batch()["position_ids"].cuda())
    operands = [torch.randn(2, heads, TOKENS, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    found = []
    for compute in (with_lengths, sample_by_sample):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        result = compute(*leaves, borders, None)
        result.float().square().sum().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """CPU tensors taken for those of a GPU, and attention with lengths as given."""
    kind = namedtuple("Device", "type")("cuda")

    def use(compute):
        monkeypatch.setattr(packed_attention, "with_lengths", compute)
        trial = packed_attention._trial
        monkeypatch.setattr(packed_attention, "_trial", lambda compute, device, *sizes: trial(compute, "cpu", *sizes))
        packed_attention.takes_lengths.cache_clear()
        return packed_attention.takes_lengths(kind, torch.bfloat16, 4, 16, 2)

    yield use
    packed_attention.takes_lengths.cache_clear()


def test_attention_with_lengths_is_taken_once_it_gave_the_same(on_a_gpu):
    assert on_a_gpu(packed_attention.sample_by_sample)


def _across_samples(query, key, value, borders, scaling, dropout=0.0):
    whole = packed_attention.Borders(borders.edges[::2], borders.on_host[::2], borders.rows)
    return sample_by_sample(query, key, value, whole, scaling, dropout)


def _fails(*args):
    raise RuntimeError("No available kernel")


@pytest.mark.parametrize(
    ("compute", "reason"), [(_across_samples, "its results differ"), (_fails, "No available kernel")]
)
def test_attention_with_lengths_that_differs_or_fails_is_not_taken(on_a_gpu, caplog, compute, reason):
    assert not on_a_gpu(compute)
    assert f"sample by sample, not by flash attention with lengths: {reason}" in caplog.text
