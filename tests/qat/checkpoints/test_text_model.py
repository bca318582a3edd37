"""Multimodal folders: refused with the command that helps, extracted exactly, or loaded with what is left out said."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qat.checkpoints.load import load_plain
from qat.checkpoints.model_config import read_config
from qat.checkpoints.text_model import extract_text_model

TEXT = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"hidden_size": 64, "intermediate_size": 96, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
FAMILIES = {
    "Qwen3VL": (TEXT, {**QWEN_VISION, "deepstack_visual_indexes": [0]}, "Qwen3ForCausalLM"),
    "Qwen2_5_VL": ({**TEXT, "rope_parameters": MROPE}, QWEN_VISION, "Qwen2ForCausalLM"),
    "Mistral3": ({**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral"}, "MistralForCausalLM"),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    text, vision, _ = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / request.param)
    make_tokenizer().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_a_folder_that_is_no_causal_language_model_names_the_command_that_makes_one(folder):
    with pytest.raises(
        ValueError, match=f"is a multimodal model .* python scripts/text_model.py {folder} DIR$"
    ) as error:
        load_plain(folder)
    assert FAMILIES[folder.name][2] in str(error.value) and "\n" not in str(error.value)


def test_the_language_model_is_extracted_exactly(folder, tmp_path):
    extract_text_model(folder, tmp_path / "text")
    text = load_plain(tmp_path / "text")
    assert type(text).__name__ == FAMILIES[folder.name][2] and text.dtype == torch.bfloat16
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(260, (1, 40))
    assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert (tmp_path / "text/tokenizer.json").is_file()


def test_a_text_model_without_a_causal_class_is_refused_in_one_line(tmp_path):
    config = transformers.Glm4vConfig(text_config=TEXT)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no causal language model of its kind of text model .glm4v_text.") as error:
        read_config(tmp_path, "M")
    assert "\n" not in str(error.value)


def test_parts_that_are_left_out_are_said(tmp_path, caplog):
    attention = {"layer_types": ["full_attention", "full_attention"]}
    config = transformers.Qwen3_5Config(text_config={**TEXT, **attention}, vision_config=QWEN_VISION)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_plain(tmp_path)
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
    said = "only the language model is loaded (Qwen3_5ForCausalLM); what is saved does not have the other parts of "
    assert f"{said}Qwen3_5Config: vision" in caplog.text
