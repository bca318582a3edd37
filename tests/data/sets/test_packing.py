"""Packing: whole samples in full rows, with the loss they have alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama, make_tokenizer, write_conversations
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from data.conversations.formatting import IGNORE_INDEX
from data.sets.collating import SupervisedCollator
from data.sets.packing import check_packing, needs_one_row, pack, plan_packing, runs_flash_attention
from training.losses.metrics import token_loss_sums
from utils import make_supervised_data_module


def make_model(attention: str = "sdpa"):
    model = make_llama().eval()
    model.config.use_cache = False
    model.set_attn_implementation(attention)
    return model


SAMPLES = st.lists(st.lists(st.integers(2, 257), min_size=2, max_size=20), min_size=1, max_size=8)
MODELS = {name: make_model(name) for name in ("eager", "sdpa")}


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_every_sample_is_in_one_row_and_no_two_rows_would_fit_into_one_when_half_empty(lengths):
    rows = plan_packing(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(total <= 50 for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 50  # else the samples of one had gone into the other


@pytest.mark.parametrize("attention", MODELS)
@settings(max_examples=25, deadline=None)
@given(samples=SAMPLES)
def test_packed_and_unpacked_samples_have_the_same_loss_at_every_token(attention, samples):
    model = MODELS[attention]
    encoded = [{"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]} for ids in samples]
    rows = [[encoded[i] for i in row] for row in plan_packing([len(ids) for ids in samples], 40)]
    packed = SupervisedCollator(0)([pack(row) for row in rows])
    padded = SupervisedCollator(0)([sample for row in rows for sample in row])

    def losses(batch: dict) -> torch.Tensor:
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].transpose(1, 2)
        nll = torch.nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none")
        return nll[labels[:, 1:] != IGNORE_INDEX]

    torch.testing.assert_close(losses(packed), losses(padded), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_packed_batch_equal_those_of_its_samples_apart():
    ids = [[5, 9, 33, 7], [8, 8, 60], [100, 3, 9, 4, 77, 6]]
    encoded = [{"input_ids": row, "labels": row} for row in ids]
    model, gradients = make_model(), []
    for batch in (SupervisedCollator(0)([pack(encoded)]), SupervisedCollator(0)(encoded)):
        model.zero_grad()
        labels = batch.pop("labels")
        nll, tokens = token_loss_sums(model(**batch).logits, labels)
        (nll.sum() / tokens.sum()).backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        assert tokens.sum() == 10
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_padding_of_packed_rows_is_a_sample_of_its_own_and_one_row_has_none():
    short, long = pack([{"input_ids": [5, 6], "labels": [5, 6]}]), pack([{"input_ids": [7] * 5, "labels": [7] * 5}])
    batch = SupervisedCollator(0)([short, long])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]] and "attention_mask" not in batch
    assert batch["labels"][0].tolist() == [-100, 6, -100, -100, -100]
    flat = SupervisedCollator(0, one_row=True)([short, long])
    assert flat["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4]] and flat["input_ids"].shape == (1, 7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_that_keep_samples_apart_are_accepted(attention):
    check_packing(make_model(attention))
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    gpt2 = GPT2LMHeadModel(config)
    gpt2.set_attn_implementation(attention)
    check_packing(gpt2)


def test_models_that_would_let_samples_see_each_other_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, use_cache=False))
    with pytest.raises(ValueError, match="--packing True: .*Mamba"):
        check_packing(mamba)
    model = make_model()
    model.config.use_cache = True
    with pytest.raises(ValueError, match="use_cache"):
        check_packing(model)
    model = make_model()
    forward = model.forward
    model.forward = lambda **kwargs: forward(**{**kwargs, "position_ids": None})
    with pytest.raises(ValueError, match="changes with its neighbour"):
        check_packing(model)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="'paged|sdpa' is not known"):
        check_packing(model)


def test_flash_attention_is_tried_as_sdpa_on_a_cpu_and_gets_one_row_a_batch():
    model, tried = make_model("sdpa"), []
    model.config._attn_implementation = "flash_attention_2"
    model.set_attn_implementation = lambda name: (
        tried.append(name) or setattr(model.config, "_attn_implementation", name)
    )
    check_packing(model)
    assert tried == ["sdpa", "flash_attention_2"] and needs_one_row(model) and not needs_one_row(make_model("sdpa"))


@pytest.mark.parametrize(
    "device, dtype, runs",
    [("cuda", torch.float32, False), ("cuda", torch.bfloat16, True), ("cpu", torch.bfloat16, False)],
)
def test_flash_attention_is_tried_in_16_bits_on_a_gpu_only(device, dtype, runs):
    weights = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert runs_flash_attention(SimpleNamespace(parameters=lambda: iter([weights]))) is runs


def test_the_module_packs_training_samples_only_and_wants_the_model(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 100
    path, cache = str(write_conversations(tmp_path / "c.jsonl")), str(tmp_path / "cache")
    with pytest.raises(ValueError, match="needs model"):
        make_supervised_data_module(path, tokenizer, packing=True, data_cache_dir=cache)
    kwargs = {"eval_size": 5, "data_cache_dir": cache}
    plain = make_supervised_data_module(path, tokenizer, **kwargs)
    packed = make_supervised_data_module(path, tokenizer, packing=True, model=make_model(), **kwargs)
    tokens = sorted(t for row in packed["train_dataset"] for t in row["input_ids"])
    assert tokens == sorted(t for sample in plain["train_dataset"] for t in sample["input_ids"])
    assert all(len(row["input_ids"]) <= 100 for row in packed["train_dataset"]) and len(packed["train_dataset"]) == 12
    assert packed["eval_dataset"][0] == plain["eval_dataset"][0]
