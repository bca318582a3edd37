"""Stored names: each tensor of a file against the values that transformers itself loads it into."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_family, save_family
from transformers import AutoModelForCausalLM

from qat import prepare_qat
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.stored_names import StoredNames, expert_layers, saved_names

RENAMED = ["mixtral", "qwen3_moe", "granitemoe", "nemotron_h", "kimi_linear", "zamba2", "qwen3_5", "gemma3"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Folders and what transformers makes of them, by family; each is built once."""
    known = {}

    def load(kind):
        if kind not in known:
            folder = CheckpointFolder.open(save_family(kind, tmp_path_factory.mktemp("families") / kind))
            known[kind] = folder, AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)
        return known[kind]

    return load


@pytest.mark.parametrize("kind", RENAMED)
def test_each_stored_tensor_has_the_values_of_its_place(loaded, kind):
    folder, model = loaded(kind)
    names, own = StoredNames(model, folder.names), model.state_dict()
    assert all(name.startswith("model.visual.") for name in names.surplus)
    for name, place in names.places.items():
        (stored,) = folder.read(name)
        if place.is_plain:
            assert torch.equal(place.of(own[place.parameter]), stored), place
        else:
            assert "conv1d" in name  # of Kimi-Linear: three are joined


@pytest.mark.parametrize("kind", RENAMED)
def test_every_parameter_is_found_in_the_files_and_names_do_not_change_once_it_is_prepared(loaded, kind):
    folder, model = loaded(kind)
    names = StoredNames(model, folder.names)
    assert all(names.of(name) for name in model.state_dict())
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    prepare_qat(skeleton, {"torch.nn.Linear": "MXFP4"})
    assert StoredNames(skeleton, folder.names).places == names.places


@pytest.mark.parametrize(
    ("kind", "module", "published"),
    [
        ("mixtral", "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"),
        ("mixtral", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
        ("mixtral", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("granitemoe", "model.layers.0.block_sparse_moe.experts", "model.layers.0.block_sparse_moe.experts"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router", "model.layers.0.block_sparse_moe.router.layer"),
        ("nemotron_h", "model.layers.1.mixer.experts", "backbone.layers.1.mixer.experts"),
        ("kimi_linear", "model.layers.0.self_attn.forget_gate.f_a_proj", "model.layers.0.self_attn.f_a_proj"),
        ("qwen3_5", "model.layers.0.linear_attn", "model.language_model.layers.0.linear_attn"),
        ("gemma3", "model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("gemma3", "model.vision_tower.encoder", "vision_tower.encoder"),
        ("gemma3", "lm_head", "lm_head"),
    ],
)
def test_published_names_of_modules(loaded, kind, module, published):
    folder, model = loaded(kind)
    names = StoredNames(model, folder.names)
    assert module in dict(model.named_modules())
    assert names.published(module) == published
    assert names.spellings(module) == ([published, module] if published != module else [module])


def test_experts_come_in_the_order_of_their_numbers_and_gate_before_up():
    model = make_family("qwen3_moe", num_experts=12)
    names = saved_names(model)
    places = names.of("model.layers.0.mlp.experts.gate_up_proj")
    assert [(place.expert, place.part) for place in places] == [(e, half) for e in range(12) for half in (0, 1)]
    assert places[21].stored == "model.layers.0.mlp.experts.10.up_proj.weight"


def test_layers_that_share_their_weight_are_one_stored_tensor(loaded):
    folder, model = loaded("zamba2")
    names = StoredNames(model, folder.names)
    first, second = (f"model.layers.{i}.shared_transformer.self_attn.q_proj.weight" for i in (0, 2))
    assert names.of(first) == names.of(second) != []
    assert {first, second} & folder.names == {names.of(first)[0].stored}


@pytest.mark.parametrize("kind", ["granitemoe", "llama4_text", "gpt_oss"])
def test_names_of_single_experts_are_placed_where_the_family_stores_fused_ones(kind):
    model = make_family(kind)
    prefix = next(name for name, module in model.named_modules() if name.endswith("experts"))
    layers = expert_layers(prefix, "gate_up_proj", 3) + expert_layers(prefix, "down_proj", 3)
    names = StoredNames(model, [f"{name}.weight" for name, *_ in layers])
    assert [name for name, *_ in layers][:2] == [f"{prefix}.0.gate_proj", f"{prefix}.0.up_proj"]
    for name, expert, part, parts in layers:
        place = names.places[f"{name}.weight"]
        own = "down_proj" if name.endswith("down_proj") else "gate_up_proj"
        assert (place.parameter, place.expert, place.part, place.parts) == (f"{prefix}.{own}", expert, part, parts)


def test_a_tensor_of_another_model_has_no_place():
    model = make_family("llama")
    foreign = ["model.layers.7.mlp.experts.0.up_proj.weight", "visual.proj.weight"]
    assert StoredNames(model, [*model.state_dict(), *foreign]).surplus == foreign
