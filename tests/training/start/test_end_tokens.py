"""Generation ends where the answers of the data end."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from chats import SMOLLM2, assistant, make_chat_tokenizer, user
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import main
from training.start.end_tokens import stop_where_answers_end
from utils import make_supervised_data_module

BEGIN, END = 0, 2  # <|begin_of_text|> and <|im_end|> in the tokenizer of tests/chats.py


def make_model(eos_token_id) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=BEGIN, eos_token_id=eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def write(path):
    rows = [{"messages": [user(f"q{i}"), assistant(f"a{i}")]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "before,after", [(BEGIN, [BEGIN, END]), ([5, BEGIN], [5, BEGIN, END]), (END, END), (None, [END])]
)
def test_the_token_that_ends_answers_is_added_where_it_is_missing(tmp_path, caplog, before, after):
    caplog.set_level(logging.INFO, "training")
    tokenizer, model = make_chat_tokenizer(SMOLLM2, 128), make_model(before)
    data = make_supervised_data_module(str(write(tmp_path / "c.jsonl")), tokenizer, data_cache_dir=str(tmp_path / "d"))
    assert tokenizer.convert_ids_to_tokens([BEGIN, END]) == ["<|begin_of_text|>", "<|im_end|>"]
    stop_where_answers_end(model, tokenizer, data)
    assert model.generation_config.eos_token_id == after and model.config.eos_token_id == after
    assert ("'<|im_end|>': added to the tokens that end generation" in caplog.text) == (before != END)


def test_a_family_whose_configuration_has_no_such_token_gets_one(tmp_path, monkeypatch):
    tokenizer, model = make_chat_tokenizer(SMOLLM2, 128), make_model(None)
    del model.config.eos_token_id  # as in CPM-Ant
    monkeypatch.delattr(LlamaConfig, "eos_token_id")
    data = make_supervised_data_module(str(write(tmp_path / "c.jsonl")), tokenizer, data_cache_dir=str(tmp_path / "d"))
    stop_where_answers_end(model, tokenizer, data)
    assert model.generation_config.eos_token_id == [END]


def test_a_base_model_trained_with_chatml_saves_and_packs_the_token_that_it_stops_at(tmp_path):
    tokenizer = make_chat_tokenizer(SMOLLM2, 128)
    tokenizer.eos_token = tokenizer.pad_token = "<|begin_of_text|>"
    make_model(BEGIN).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    main.main(
        [
            "--model_name_or_path", str(tmp_path / "base"), "--dataset", str(write(tmp_path / "c.jsonl")),
            "--eval_size", "2", "--do_train", "True", "--max_steps", "1", "--per_device_train_batch_size", "2",
            "--quant_scheme", "MXFP4", "--output_dir", str(tmp_path / "out"), "--report_to", "none",
            "--report", "False", "--model_max_length", "128", "--export_format", "none",
        ]
    )  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [BEGIN, END]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [BEGIN, END]
