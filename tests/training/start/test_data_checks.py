"""A model's embeddings and positions, and the data that is to fit them."""

from __future__ import annotations

import logging

import pytest
from helpers import make_llama, make_tokenizer, write_conversations
from transformers import LlamaConfig

from data.supervised import make_supervised_data_module
from training.start.data_checks import check_fit, local_paths
from training.start.skeleton import check_length, positions_of


def prepared(tmp_path, tokenizer, length: int = 2048) -> dict:
    tokenizer.model_max_length = length
    path = write_conversations(tmp_path / "data.jsonl", 12)
    return make_supervised_data_module(str(path), tokenizer, eval_size=2, data_cache_dir=str(tmp_path / "cache"))


def test_a_token_without_an_embedding_counts_only_where_it_occurs(tmp_path):
    tokenizer, model = make_tokenizer(), make_llama(layers=1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>", "It"]})  # 260 is the third
    check_fit(prepared(tmp_path, make_tokenizer()), tokenizer, model, 2048)
    with pytest.raises(ValueError, match="--dataset has the token 'It' with the id 260, and .* embedding has 260 rows"):
        check_fit(prepared(tmp_path, tokenizer), tokenizer, model, 2048)


def test_samples_beyond_computed_positions_are_warned_of(tmp_path, caplog):
    model = make_llama(layers=1)
    model.config.max_position_embeddings = 24
    with caplog.at_level(logging.WARNING):
        check_fit(prepared(tmp_path, make_tokenizer(), 24), make_tokenizer(), model, 24)
        assert not caplog.messages
        check_fit(prepared(tmp_path, make_tokenizer()), make_tokenizer(), model, 2048)
    assert "tokens, and the model has 24 positions; give --model_max_length 24" in caplog.text


def test_scaled_positions_count():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    assert positions_of(LlamaConfig(max_position_embeddings=100, rope_parameters=yarn)) == 400
    assert positions_of(LlamaConfig(max_position_embeddings=400, rope_parameters=yarn)) == 400
    assert positions_of(LlamaConfig(max_position_embeddings=100)) == 100
    check_length(2048, 2048, LlamaConfig(max_position_embeddings=100))  # the default is nobody's wish
    with pytest.raises(ValueError, match="--model_max_length 101 is more than the 100 positions"):
        check_length(101, 2048, LlamaConfig(max_position_embeddings=100))


def test_local_paths_of_a_list_of_datasets(tmp_path):
    a, b = (write_conversations(tmp_path / name, 1) for name in ("a.jsonl", "b,c.jsonl"))
    assert list(local_paths(f"{a}:0.5, user/name:0.3,python-docs:0.2")) == [a]
    assert list(local_paths(str(b))) == [b] and list(local_paths(None)) == []
