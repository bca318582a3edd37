"""Which layers get adapters, and how much of a model that covers."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_llama, make_mixture
from peft import LoraConfig, get_peft_model
from torch import nn

from qat import prepare_qat
from qat.errors import UserError
from qat.layers.lora import adapters
from training.adapters.files import write_adapter
from training.adapters.inject import add_adapters, config_of
from training.adapters.merging import factors_of
from training.arguments.lora import LoraArguments


def config(*targets: str, **kwargs) -> LoraConfig:
    arguments = LoraArguments(lora_r=4, lora_target=list(targets) or None)
    return LoraConfig(r=4, target_modules=arguments.target_modules, **kwargs)


def peft_layers(model: nn.Module, lora_config: LoraConfig) -> set[str]:
    """The layers that peft itself chooses."""
    names = get_peft_model(model, lora_config).state_dict()
    return {n.removeprefix("base_model.model.").partition(".lora_A")[0] for n in names if ".lora_A." in n}


@pytest.mark.parametrize(
    "targets",
    [(), ("q_proj", "down_proj"), ("layers.1.mlp.up_proj",), (r".*\.1\.self_attn\.[qk]_proj",)],
    ids=lambda targets: " ".join(targets) or "all-linear",
)
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_where_peft_has_them(targets, tied):
    model = prepare_qat(make_llama(tied), {"torch.nn.Linear": "MXFP4"})
    add_adapters(model, config(*targets))
    assert set(adapters(model)) == peft_layers(make_llama(tied), config(*targets))


def test_the_head_gets_one_where_it_is_named_and_not_tied():
    assert set(adapters(add_adapters(make_llama(False), config("lm_head")))) == {"lm_head"}


def test_all_linear_is_saved_as_the_last_parts_of_names_in_order(tmp_path):
    model = add_adapters(make_llama(), config())
    write_adapter(tmp_path, model, factors_of(model), "base")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert saved["target_modules"] == names and saved["base_model_name_or_path"] == "base"


def test_a_layer_that_learns_scales_or_holds_quantized_values_is_refused():
    model = prepare_qat(make_llama(), {"torch.nn.Linear": "MXFP4"}, learn_exponent=True)
    with pytest.raises(UserError, match="learns the scales of its weight"):
        add_adapters(model, config())


def test_a_convolution_is_refused():
    model = make_llama()
    model.model.layers[0].mlp.conv = nn.Conv1d(4, 4, 3)
    with pytest.raises(UserError, match="mlp.conv is a Conv1d, and adapters are for linear layers"):
        add_adapters(model, config("conv"))


def test_experts_without_adapters_are_told_with_the_fraction_covered(caplog):
    model = make_mixture(layers=1)
    add_adapters(model, config("q_proj"))
    linear = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "adapter" not in n}
    linear = {n: size for n, size in linear.items() if "embed" not in n and "lm_head" not in n}
    share = linear["model.layers.0.self_attn.q_proj.weight"] / sum(linear.values())
    assert f"adapters cover {int(share * 1000) / 10:.1f} % of the linear weights only" in caplog.text
    assert "model.layers.*.mlp.experts.gate_up_proj" in caplog.text


def test_the_same_seed_gives_the_same_adapters_and_moves_no_other_random_numbers():
    models = [make_llama() for _ in range(3)]
    before = torch.random.get_rng_state()
    one, two, other = (factors_of(add_adapters(m, config(), s)) for m, s in zip(models, (1, 1, 2), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_configuration_keeps_how_adapters_began_where_there_are_no_weights_to_decompose():
    with torch.device("meta"):
        model = make_llama()
    add_adapters(model, config(init_lora_weights="pissa"))
    assert config_of(model).init_lora_weights == "pissa"
