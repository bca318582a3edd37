"""GPT-2 and Falcon, packed: what engines read as torch.nn.Linear, and what the proof says of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from qat import get_scheme, prepare_qat
from qat.checkpoints import verify_logits as logits
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.pack_tensors import pack_weight
from qat.checkpoints.verify import verify
from qat.errors import UserError

GPT2 = {"n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1}
FALCON = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 260, "bos_token_id": 0,
          "eos_token_id": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def same_process(monkeypatch, tmp_path):
    """Start no process for logits: the same program, called; what it raises is what a process writes."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, input_ids):
        save_file({"input_ids": input_ids}, "inputs.safetensors")
        try:
            logits.main([*arguments, "--inputs", "inputs.safetensors", "--outputs", "outputs.safetensors"])
        except UserError as error:
            raise logits.NotLoadableError(str(error)) from error
        return load_file("outputs.safetensors")

    monkeypatch.setattr(logits, "_begin", lambda stack, *given: partial(run, *given))


def save(model: PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_conv1d_is_packed_as_the_linear_layer_of_engines_and_the_verdict_says_why_there_are_no_logits(tmp_path):
    source = save(GPT2LMHeadModel(GPT2Config(**GPT2)), tmp_path / "source")
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP4")
    stored, weights = load_file(packed / "model.safetensors"), load_file(source / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc"
    expected = pack_weight(weights[f"{name}.weight"].t().contiguous(), get_scheme("MXFP4").weight)
    assert stored[f"{name}.weight_packed"].shape == (256, 32) and f"{name}.weight" not in stored
    assert torch.equal(stored[f"{name}.weight_scale"], expected.scales[0])
    verdict = verify(packed, source, tokens=48)
    assert verdict["verified"] and verdict["weights"]["packed_weights"] == 4 and verdict["logits"] is None
    assert "is a Conv1D there, and it reads packed weights of torch.nn.Linear only" in verdict["why_no_logits"]
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("scheme", ["MXFP8", "FP8"])
def test_formats_whose_packed_weight_engines_would_transpose_are_refused(tmp_path, scheme):
    source = save(GPT2LMHeadModel(GPT2Config(**GPT2)), tmp_path / "source")
    with pytest.raises(ValueError, match=f"c_attn is a Conv1D in {scheme}: .* use a scheme of 4 bits"):
        export_checkpoint(source, tmp_path / "packed", scheme=scheme)


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_is_packed_and_proven_though_transformers_cannot_load_it(tmp_path, bias):
    source = save(FalconForCausalLM(FalconConfig(**FALCON, bias=bias)), tmp_path / "source")
    model = prepare_qat(FalconForCausalLM.from_pretrained(source), {"torch.nn.Linear": "MXFP4"})
    model.qat_config.save(source)
    verdict = verify(export_checkpoint(source, tmp_path / "packed"), source, tokens=48)
    assert verdict["verified"] and verdict["weights"]["packed_weights"] == 4 and verdict["logits"] is None
    assert "_init_weights in modeling_falcon.py reads the weight of a layer that is packed" in verdict["why_no_logits"]
