"""Whether a mixture of experts computes the same: rounding that swaps two experts is no change, another score is."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from qat import prepare_qat
from qat.layers.sites import quantizers_off
from qat.transforms.equality import Equality
from qat.transforms.smoothing import smooth

IDS = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(1))


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return prepare_qat(model, {torch.nn.Linear: "MXFP4"})


@torch.no_grad()
def test_experts_whose_scores_are_almost_equal_do_not_keep_a_model_from_being_smoothed():
    model = make_mixtral()
    for layer in model.model.layers:
        noise = 1 + 2e-7 * torch.randn(64)
        layer.mlp.gate.weight[1] = layer.mlp.gate.weight[0] * noise  # a token goes to either, as rounding will have it
    with quantizers_off(model):
        before = model(IDS).logits
        result = smooth(model, [{"input_ids": IDS}], 0.7)
        change = (model(IDS).logits - before).abs().max() / before.abs().max()
    assert (result.smoothed, result.inputs, result.left) == (8, 8, {})
    assert result.moved < 1e-4 < 1e-2 < change


@torch.no_grad()
def test_a_router_that_reads_the_norm_in_a_way_that_is_not_seen_keeps_it_as_it_is():
    model = make_mixtral()
    gate = model.model.layers[1].mlp.gate
    own = gate.forward

    def forward(x):
        return own(x.clone())  # of other storage

    gate.forward = forward
    result = smooth(model, [{"input_ids": IDS}], 0.7)
    assert list(result.left) == ["model.layers.1.post_attention_layernorm"] and result.smoothed == 7


@torch.no_grad()
def test_what_is_compared_is_the_largest_change_of_a_token_over_the_largest_logit():
    model = make_mixtral()
    with quantizers_off(model):
        equality = Equality(model, {"input_ids": IDS})
        before = model(IDS).logits
        assert equality.moved() == 0
        model.lm_head.weight[5] *= 1.01
        expected = (before[..., 5] * 0.01).abs().max() / before.abs().max()
        torch.testing.assert_close(torch.tensor(equality.moved()), expected, rtol=1e-3, atol=0)
