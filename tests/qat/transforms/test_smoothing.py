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
from qat.transforms.factors import smoothing_factors
from qat.transforms.smoothing import smooth

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
    ("config", "count"),
    [
        (Qwen2Config(**SIZES), 8),  # biases on q, k and v
        (Qwen3Config(**SIZES), 8),  # norms inside of attention
        (Gemma2Config(**SIZES), 8),  # norms that multiply by 1 + weight
        (GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k}), 4),  # LayerNorm with bias
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_smoothed_model_computes_what_it_computed(config, count):
    torch.manual_seed(0)
    model = with_outlier_channels(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    expected = model(IDS).logits
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ignore=("lm_head", "embed_out"))
    result = smooth(model, BATCHES, 0.7)
    assert (result.smoothed, result.inputs, result.left) == (count, 8, {})
    assert len(result.uncovered) == 8 - count
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
    torch.testing.assert_close(smoothing_factors(largest, weight, 0.75, 0.25), expected)


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
    """Its first norm is read by a linear layer, and by a product that no hook can see; its second one by a layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = torch.nn.Embedding(128, 64), *(torch.nn.LayerNorm(64) for _ in range(2))
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, input_ids):
        x = self.first(self.embed(input_ids))
        return SimpleNamespace(logits=self.two(self.second(self.one(x) + x * torch.arange(64))))


def test_an_activation_with_an_unknown_reader_is_undone_exactly_and_the_others_stay(caplog):
    torch.manual_seed(0)
    model = prepare_qat(WithUnknownReader(), {torch.nn.Linear: "MXFP4"}, ignore=())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = smooth(model, BATCHES, 0.7)
    assert (result.smoothed, result.inputs, list(result.left), result.uncovered) == (1, 2, ["first"], ())
    assert result.left["first"] > 1e-3 > result.moved
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert set(before) - same == {"second.weight", "two.weight"}  # its bias is 0
    (record,) = [record for record in caplog.records if record.name.startswith("qat")]
    assert record.levelname == "WARNING"
    assert record.message.startswith("Smoothed 1 of 2 activations; left: first (logits move by ")


def test_in_a_model_without_anything_to_smooth_a_warning_is_all_that_happens(caplog):
    config = OlmoConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})  # its norms have no weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepare_qat(model, {"*.q_proj": "MXFP4"}, ignore=())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = smooth(model, BATCHES, 0.7)
    assert (result.smoothed, result.inputs, result.left) == (0, 2, {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "OlmoForCausalLM continues without smoothing, which --smooth_alpha 0.7 asks for: smoothed 0" in caplog.text
    assert "2 with no norm, v_proj or gated up_proj directly before, e.g. the input of model.layers.0" in caplog.text


def test_an_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match="alpha 1.5 is out of range"):
        smooth(make_llama(), BATCHES, 1.5)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="smoothing needs at least one sample"):
        smooth(make_llama(), [], 0.7)
