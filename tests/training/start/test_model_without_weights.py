"""Models that cannot be trained are refused by their configuration alone."""

from __future__ import annotations

import pytest
from families.configs import small_config
from helpers import make_tokenizer, write_conversations
from safetensors.torch import save_file
from transformers import LlamaConfig, XLNetConfig

import main
from qat.errors import UserError
from training.start.skeleton import positions_of


@pytest.mark.parametrize(
    "family,named",
    [
        ("dbrx", "--bf16 True: transformers' code of dbrx does not run under autocast"),
        ("mllama", "'mllama_text_model', and AutoModelForCausalLM could not load it again"),
    ],
)
def test_a_family_that_cannot_be_trained_is_refused_before_its_weights_are_read(family, named, tmp_path):
    small_config(family).save_pretrained(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors", {"format": "pt"})  # there are no weights to read
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    words += ["--dataset", str(write_conversations(tmp_path / "data.jsonl")), "--do_train", "True"]
    with pytest.raises(UserError) as error:
        main.main(words)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config,positions", [(LlamaConfig(max_position_embeddings=64), 64), (XLNetConfig(), None)])
def test_a_family_without_a_table_of_positions_has_no_limit(config, positions):
    assert positions_of(config) == positions
