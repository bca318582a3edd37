"""What is left unquantized by default, why, and how a mapping asks for it nevertheless."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import make_llama
from torch import nn
from transformers import AutoModelForCausalLM

from qat import QATConfig, is_quantlinear, prepare_qat
from qat.errors import UserError
from qat.layers.left_alone import DECAY, HEAD, NARROW, ROUTER, TOWER, UNCALLED, as_patterns
from qat.layers.restore import prepare_as_saved
from qat.layers.share import describe_left, left_unquantized

TEXT = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def make(name: str, **settings) -> nn.Module:
    """The causal language model of transformers' configuration NAMEConfig, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantlinear(module)}


def layers(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})


def test_the_head_is_left_under_whatever_name():
    settings = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
    model = prepare_qat(make("ModernBertDecoder", **settings), {nn.Linear: "MXFP4"})
    assert model.qat_config.left_alone == {"decoder": HEAD} and "decoder" not in quantized(model)
    asked = prepare_qat(make("ModernBertDecoder", **settings), {nn.Linear: "MXFP4"}, ignore=())
    assert "decoder" in quantized(asked) and asked.qat_config.left_alone == {}


def test_routers_and_gates_are_left_also_where_they_are_no_linear_layers(capsys):
    settings = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 64}
    model = prepare_qat(make("Qwen2Moe", **TEXT, **settings), {nn.Linear: "MXFP4"})
    assert model.qat_config.left_alone == {f"model.layers.{i}.mlp.shared_expert_gate": ROUTER for i in (0, 1)}
    assert f"4 modules with {2 * 65 * 64:,} weights ({ROUTER}), e.g. model.layers.0.mlp.gate" in capsys.readouterr().out
    inside = nn.ModuleDict({"router": layers(layer=(64, 64)), "mlp": layers(gate_proj=(64, 64))})
    assert quantized(prepare_qat(inside, {nn.Linear: "MXFP4"})) == {"mlp.gate_proj"}


MIXTRAL = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"num_local_experts": 4}


@pytest.mark.parametrize(
    "key,message",
    [
        ("*.mlp.gate", "it matches model.layers.0.mlp.gate, which cannot be quantized: MixtralTopKRouter is not a"),
        (
            "*.experts.gate_up_proj",
            r"all experts of a layer have one scheme, and the name model.layers.0.mlp.experts; ",
        ),
        ("*.experst", r"the model has 13 weight modules: .*, model.layers.\*.mlp.experts, .*lm_head"),
    ],
)
def test_a_pattern_that_misses_the_experts_or_names_the_router_says_why(key, message):
    with pytest.raises(UserError, match=message):
        prepare_qat(make("Mixtral", **MIXTRAL), {nn.Linear: "MXFP4", key: "MXFP8"})
    if "gate" not in key.split("."):
        with pytest.raises(UserError, match=message):
            prepare_qat(make("Mixtral", **MIXTRAL), {nn.Linear: "MXFP4"}, ignore=("lm_head", key))


def test_what_a_saved_model_left_is_what_the_run_said(capsys):
    ignore = ("lm_head", "re:.*layers.1.*")  # it matches a router as well
    model = prepare_qat(make("Mixtral", **MIXTRAL), {nn.Linear: "MXFP4"}, ignore)
    said = [line.partition("unquantized: ")[2] for line in capsys.readouterr().out.splitlines() if "left un" in line]
    assert describe_left(model, left_unquantized(model, model.qat_config)) == said


def test_a_projection_whose_weight_the_model_reads_without_calling_the_layer_is_left():
    settings = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 1, "time_step_rank": 32}
    model = prepare_qat(make("Mamba", **settings), {nn.Linear: "MXFP4"})
    assert model.qat_config.left_alone["backbone.layers.0.mixer.dt_proj"] == UNCALLED
    assert "backbone.layers.0.mixer.x_proj" in quantized(model)


def test_decays_of_linear_attention_are_left():
    model = prepare_qat(make("Qwen3_5Text", **TEXT, **LINEAR_ATTENTION), {nn.Linear: "MXFP4"})
    names = {f"model.layers.0.linear_attn.in_proj_{letter}" for letter in "ab"}
    assert model.qat_config.left_alone == dict.fromkeys(names, DECAY)
    assert "model.layers.0.linear_attn.in_proj_qkv" in quantized(model)


def test_layers_with_fewer_than_32_outputs_are_left():
    model = prepare_qat(layers(narrow=(64, 31), enough=(64, 32)), {nn.Linear: "MXFP4"})
    assert quantized(model) == {"enough"} and model.qat_config.left_alone == {"narrow": NARROW}
    with pytest.raises(ValueError, match=f"1 are left alone by default .e.g. narrow: {NARROW}; name it"):
        prepare_qat(layers(narrow=(64, 31)), {nn.Linear: "MXFP4"})


@pytest.mark.parametrize(
    ("name", "vision", "outside"),
    [
        ("Gemma3", {**VISION, "image_size": 28, "patch_size": 14}, "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("Gemma4", {**VISION, "head_dim": 32, "num_key_value_heads": 2}, "model.embed_vision.embedding_projection"),
    ],
)
def test_towers_and_projectors_of_multimodal_models_are_left(name, vision, outside):
    model = prepare_qat(make(name, text_config=TEXT, vision_config=vision), {nn.Linear: "MXFP4"})
    assert model.qat_config.left_alone[outside] == TOWER
    assert quantized(model) and all(name.startswith("model.language_model.") for name in quantized(model))
    assert not any(name.startswith("model.language_model.") for name in model.qat_config.left_alone)


def test_layers_that_no_block_divides_are_left_and_counted(capsys):
    model = prepare_qat(layers(good=(64, 64), odd=(40, 64), other=(48, 64)), {nn.Linear: "MXFP4"})
    reason = "in_features that the blocks of MXFP4 do not divide"
    assert model.qat_config.left_alone == {"odd": reason, "other": reason}
    assert f"2 modules with {88 * 64:,} weights ({reason}), e.g. odd" in capsys.readouterr().out
    assert quantized(prepare_qat(layers(any=(40, 64)), {nn.Linear: "FP8"})) == {"any"}


def test_a_pattern_that_names_layers_that_no_block_divides_is_an_error_that_lists_them_all():
    model = nn.ModuleDict({"layers": nn.ModuleList(layers(odd=(40, 64), even=(64, 64)) for _ in range(3))})
    message = "layers.0.odd has in_features=40, .* block size 32 of mxfp4, and so it is with 2 more; .*--ignore "
    with pytest.raises(ValueError, match=rf"{message}'layers.\*.odd' "):
        prepare_qat(model, {"layers.*": "MXFP4"})
    assert not quantized(model)
    assert len(quantized(prepare_qat(model, {"layers.*": "MXFP4"}, ignore=["layers.*.odd"]))) == 3


def test_patterns_match_the_given_names_alone():
    names = ["a.0.x", "a.1.x", "b.0.y", "c.3.4.z", "c.5.6.z"]
    assert as_patterns(names) == ["a.*.x", "b.0.y", "c.*.*.z"]
    assert as_patterns(names, {"a.2.x"}) == ["a.0.x", "a.1.x", "b.0.y", "c.*.*.z"]


@pytest.mark.parametrize(("pattern", "name"), [("narrow", "mlp.narrow"), ("*.gate", "mlp.gate"), ("re:.*up", "mlp.up")])
def test_a_pattern_of_its_own_asks_for_what_a_rule_would_leave(pattern, name):
    model = nn.ModuleDict({"mlp": layers(narrow=(64, 8), gate=(64, 64), up=(64, 31), down=(64, 64))})
    prepare_qat(model, {nn.Linear: "MXFP8", pattern: "MXFP4"})
    assert quantized(model) == {name, "mlp.down"} and model.get_submodule(name).scheme.name == "MXFP4"


def test_a_saved_configuration_restores_the_same_layers():
    model = prepare_qat(make("Qwen3_5Text", **TEXT, **LINEAR_ATTENTION), {nn.Linear: "MXFP4"})
    again = prepare_as_saved(make("Qwen3_5Text", **TEXT, **LINEAR_ATTENTION), model.qat_config)
    assert quantized(again) == quantized(model) and again.qat_config == model.qat_config


def test_a_folder_of_earlier_versions_restores_what_it_was_trained_with(tmp_path):
    """Those had no default rules: its routers, narrow layers and the like are quantized."""
    content = {"format_version": 1, "mapping": {"torch.nn.Linear": "MXFP4"}, "ignore": ["lm_head"]}
    (tmp_path / "qat_config.json").write_text(json.dumps(content))
    config = QATConfig.load(tmp_path)
    assert config.left_alone == {} and config.kinds == ("linear",)
    model = nn.ModuleDict({"mlp": layers(gate=(64, 8), up_proj=(64, 64))})
    assert quantized(prepare_as_saved(model, config)) == {"mlp.gate", "mlp.up_proj"}
    dense = prepare_qat(make_llama(), {nn.Linear: "MXFP4"}).qat_config
    content["scale_rules"] = dense.scale_rules
    (tmp_path / "qat_config.json").write_text(json.dumps(content))
    assert QATConfig.load(tmp_path).same_training(dense)  # so the run can be resumed


def test_a_run_is_not_resumed_where_other_layers_were_left():
    new = prepare_qat(layers(gate=(64, 64), up=(64, 64)), {nn.Linear: "MXFP4"}).qat_config
    old = prepare_qat(layers(gate=(64, 64), up=(64, 64)), {nn.Linear: "MXFP4"}, left_alone={}).qat_config
    assert new.left_alone and not old.left_alone and not new.same_training(old)
