"""Smoothing moves large channels out of activations and leaves the model's function alone."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from qat import prepare_qat
from qat.transforms.smoothing import smooth, smoothing_factors

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]


def with_outlier_channels(model):
    """Norms that let a few channels stick out, as trained models have them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter[3] += 30.0
    return model.eval()


def input_maxima(model, name):
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].abs().flatten(0, -2).amax(0)))
    for batch in BATCHES:
        model(**batch)
    handle.remove()
    return torch.stack(seen).amax(0)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (Qwen2Config(**SIZES), 8),  # biases on q, k and v
        (Qwen3Config(**SIZES), 8),  # norms inside of attention
        (Gemma2Config(**SIZES), 8),  # norms that multiply by 1 + weight
        (GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k}), 4),  # LayerNorm with bias
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_smoothed_model_computes_what_it_computed(config, groups):
    torch.manual_seed(0)
    model = with_outlier_channels(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    expected = model(IDS).logits
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ignore=("lm_head", "embed_out"))
    assert smooth(model, BATCHES, 0.7) == groups
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.disable(), module.input_quantizer.disable()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_alpha_one_makes_all_channels_of_an_input_equally_large():
    model = prepare_qat(with_outlier_channels(make_llama()), {torch.nn.Linear: "MXFP8"})
    smooth(model, BATCHES, 1.0)
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.disable(), module.input_quantizer.disable()
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        maxima = input_maxima(model, f"model.layers.1.{name}")
        torch.testing.assert_close(maxima, maxima.mean().expand_as(maxima), rtol=1e-3, atol=0)


def test_factors_are_those_of_the_paper():
    largest, weight = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 4.0])
    expected = torch.tensor([8**0.75, 2**0.75 / 2**0.25, 0.5**0.75 / 4**0.25])
    expected = expected / expected.prod() ** (1 / 3)
    torch.testing.assert_close(smoothing_factors(largest, weight, 0.75), expected)


def test_a_model_with_outlier_channels_loses_less_to_quantization_when_smoothed():
    def model_with_outliers():
        model = make_llama().eval()
        with torch.no_grad():
            for layer in model.model.layers:  # two channels stick out, and weights of their own make up for it
                layer.post_attention_layernorm.weight[[3, 40]] *= 64
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[:, [3, 40]] /= 64
        return model

    expected = make_llama().eval()(IDS).logits
    errors = []
    for alpha in (None, 0.7):
        model = prepare_qat(model_with_outliers(), {torch.nn.Linear: "MXFP4"})
        if alpha is not None:
            smooth(model, BATCHES, alpha)
        errors.append(float((model(IDS).logits - expected).pow(2).mean()))
    assert errors[1] < 0.7 * errors[0]


class WithUnknownReader(torch.nn.Module):
    """Its norm is read by a linear layer, and by a product that no hook can see."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.linear = (
            torch.nn.Embedding(128, 64),
            torch.nn.LayerNorm(64),
            torch.nn.Linear(64, 64),
        )

    def forward(self, input_ids):
        x = self.norm(self.embed(input_ids))
        return SimpleNamespace(logits=self.linear(x) + x * torch.arange(64))


def test_every_reader_of_a_norm_is_scaled_or_the_model_is_refused():
    torch.manual_seed(0)
    model = prepare_qat(WithUnknownReader(), {torch.nn.Linear: "MXFP4"})
    with pytest.raises(ValueError, match="smoothing changes what WithUnknownReader computes"):
        smooth(model, BATCHES, 0.7)


def test_a_model_without_anything_to_smooth_is_refused():
    config = OlmoConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})  # its norms have no weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepare_qat(model, {"*.q_proj": "MXFP4"}, ignore=())
    with pytest.raises(ValueError, match="no activation that could be smoothed"):
        smooth(model, BATCHES, 0.7)


def test_an_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match="alpha 1.5 is out of range"):
        smooth(make_llama(), BATCHES, 1.5)
