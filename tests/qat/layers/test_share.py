"""The share of the linear weights that is quantized: counted by hand, said first, warned of."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import make_llama
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from qat import get_quantization_format, prepare_qat, quantized_share
from qat.layers.share import describe_sites, linear_weights, percent
from qat.layers.sites import quantized_sites


class Mixed(nn.Module):
    """4,096 weights in a linear layer, 2,048 in a raw matrix, 1,024 in a convolution; an embedding and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(260, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.matrix, self.matrix_bias = nn.Parameter(torch.zeros(2, 16, 64)), nn.Parameter(torch.zeros(2, 64))
        self.conv, self.head = nn.Conv1d(16, 16, 4), nn.Linear(64, 260)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_linear_weights_are_all_matrices_but_embeddings_and_the_head():
    found = linear_weights(Mixed())
    assert {name: w.numel() for name, w in found.items()} == {"up.weight": 4096, "matrix": 2048, "conv.weight": 1024}


def test_the_share_is_that_of_elements_in_quantized_sites():
    model = Mixed()
    assert quantized_share(model) == 0.0
    assert quantized_share(prepare_qat(model, {nn.Linear: "MXFP4"})) == 4096 / 7168
    assert quantized_share(prepare_qat(Mixed(), {nn.Linear: "MXFP4"}, ignore=())) == 4096 / 7168  # heads do not count
    assert quantized_share(prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, learn_exponent=True)) == 1.0
    assert quantized_share(nn.Module()) == 0.0


def test_the_share_is_said_first_and_a_small_one_is_warned_of(capsys, caplog):
    prepare_qat(Mixed(), {nn.Linear: "MXFP4"})
    said = capsys.readouterr().out
    assert said.startswith("57.1 % of the linear weights are quantized: 1 linear layer in MXFP4\n")
    assert "left unquantized: 1 module with 16,640 weights (the output head), e.g. head\n" in said
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "only 57.1 % of the linear weights are quantized; the largest part left: " in record.getMessage()


def test_experts_are_in_the_share_and_counted_by_layers(capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 4}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=260, num_attention_heads=2, num_key_value_heads=2))
    prepare_qat(model, {nn.Linear: "MXFP8", "*.experts": "MXFP4A16"})
    routers, layers = 3 * 4 * 64, 3 * (4 * 64 * 64 + 4 * 3 * 64 * 96)
    assert quantized_share(model) == layers / (layers + routers)
    said = capsys.readouterr().out
    assert said.startswith("99.7 % of the linear weights are quantized: 12 linear layers in MXFP8, the experts of 3")
    assert f"left unquantized: 3 modules with {routers:,} weights (a router or a gate), e.g. model.layers.0.mlp" in said
    assert get_quantization_format(model) == "mixed: MXFP4A16 x 3 experts, MXFP8 x 12"


def test_shares_are_rounded_down():
    said = ["0.0 %", "57.1 %", "90.0 %", "99.9 %", "100.0 %"]
    assert [percent(share) for share in (0, 0.57149, 0.9, 0.99999, 1)] == said


def test_a_large_share_is_not_warned_of(capsys, caplog):
    prepare_qat(make_llama(), {nn.Linear: "MXFP4"})
    assert capsys.readouterr().out.startswith(
        "100.0 % of the linear weights are quantized: 14 linear layers in MXFP4\n"
    )
    assert not caplog.records


def test_other_processes_than_the_first_say_nothing(capsys, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare_qat(Mixed(), {nn.Linear: "MXFP4"})
    assert not capsys.readouterr().out and not caplog.records


@pytest.mark.parametrize("learns", [False, True])
def test_sites_are_counted_by_scheme(learns):
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4", "*.down_proj": "MXFP8"}, learn_exponent=learns)
    assert describe_sites(quantized_sites(model)) == "12 linear layers in MXFP4, 2 linear layers in MXFP8"
