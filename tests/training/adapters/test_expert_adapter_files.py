"""Adapters of experts from PEFT's configuration to its files, and to the saved and the packed model."""

from __future__ import annotations

import pytest
import torch
from helpers import make_mixture
from peft import LoraConfig, PeftModel
from torch import nn
from trainers import make_data, make_trainer
from transformers import AutoModelForCausalLM

from qat import QATConfig, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.errors import UserError
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.lora import adapters, weight_name
from qat.layers.restore import prepare_as_saved
from training.adapters.files import factor_names, read_factors, write_adapter
from training.adapters.inject import add_adapters, config_of, summary
from training.adapters.merging import factors_of, merged_weights
from training.adapters.published import read_config
from training.adapters.stacks import as_published, from_published

IDS = torch.arange(4, 52).reshape(2, 24)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def make_model(kind: str, dtype: torch.dtype, scheme: str | None = None, **settings) -> nn.Module:
    """A tiny mixture with adapters, B random."""
    model = make_mixture(
        kind, layers=1, **{name: settings.pop(name) for name in ("mlp_only_layers",) if name in settings}
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = compute_in_autocast_dtype(model) if scheme is None else prepare_qat(model, {nn.Linear: scheme})
    targets = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, **settings}
    add_adapters(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    generator = torch.Generator().manual_seed(0)
    for module in adapters(model).values():
        nn.init.normal_(module.adapter.lora_B, 0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16"])
def test_the_trained_model_is_the_merged_one_that_is_saved_and_packed(kind, scheme, data, tmp_path):
    model = make_model(kind, torch.bfloat16, scheme)
    before = {name: factor.clone() for name, factor in factors_of(model).items()}
    trainer = make_trainer(tmp_path, model, data, "self", learning_rate=1e-2, distill_ce_weight=0.5)
    trainer.train()
    assert all(not torch.equal(factor, before[name]) for name, factor in factors_of(model).items())
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    saved = prepare_as_saved(saved, QATConfig.load(tmp_path / "out"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, expected = (m.eval()(input_ids=IDS).logits for m in (model, saved))
    assert torch.equal(own, expected)
    export_checkpoint(tmp_path / "out", tmp_path / "packed", export_format="compressed-tensors")
    verdict = verify(tmp_path / "packed", tmp_path / "out", with_logits=False)
    assert verdict["verified"] and verdict["weights"]["elements_that_differ"] == 0


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_peft_loads_the_files_and_merges_to_the_same_weights(kind, tmp_path):
    model = make_model(kind, torch.float32)
    write_adapter(tmp_path, model, factors_of(model), None)
    loaded = PeftModel.from_pretrained(make_mixture(kind, layers=1), str(tmp_path))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload().state_dict()
    for name, weight in merged_weights(model).items():
        assert not torch.equal(weight, model.state_dict()[name])
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6)


def test_of_experts_in_bfloat16_peft_rounds_the_product_before_it_adds_it(tmp_path):
    """Which is why its merge differs from ours in last bits there, and the finished model is the one to serve."""
    model = make_model("qwen3_moe", torch.bfloat16)
    write_adapter(tmp_path, model, factors_of(model), None)
    base = make_mixture("qwen3_moe", layers=1).bfloat16()
    merged, ours = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload().state_dict(), merged_weights(model)
    for name, module in adapters(model).items():
        a, b = module.adapter.factors
        own = weight_name(name, module)
        if "experts" in name:
            rounded_twice = module.weight + (b @ a * module.adapter.scaling).bfloat16()
            assert (merged[own] != rounded_twice).float().mean() < 1e-3  # sums in another order
        else:
            assert torch.equal(merged[own], ours[own])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_are_read_back_as_they_were_written(kind, tmp_path):
    model = make_model(kind, torch.bfloat16, "MXFP4", target_modules="all-linear")
    write_adapter(tmp_path, model, factors_of(model), None)
    twin = make_model(kind, torch.bfloat16, "MXFP4")
    if kind == "qwen3_moe":
        with pytest.raises(UserError, match="k_proj|o_proj|gate_up_proj|lora"):
            read_factors(tmp_path, twin)  # fewer layers have adapters
    other = prepare_qat(make_mixture(kind, layers=1), {nn.Linear: "MXFP4"})
    add_adapters(other, read_config(tmp_path), seed=7)
    read = read_factors(tmp_path, other)
    expected = factors_of(model)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def test_experts_get_adapters_where_they_are_asked_for_and_the_router_never_does():
    for asked in (None, EXPERTS):
        model = make_model("qwen3_moe", torch.bfloat16, "MXFP4", target_modules="all-linear", target_parameters=asked)
        named = {weight_name(name, module).removeprefix("model.layers.0.") for name, module in adapters(model).items()}
        assert named == {f"self_attn.{which}_proj.weight" for which in "qkvo"} | set(asked or ())
        assert config_of(model).target_parameters == (None if asked is None else sorted(asked))
    assert "adapters in 6 layers with 99.7 %" in summary(model)


def test_a_configuration_for_experts_alone_is_enough():
    model = make_model("qwen3_moe", torch.bfloat16, "MXFP4", target_modules=[])
    assert {module.parameter for module in adapters(model).values()} == {"gate_up_proj", "down_proj"}


def test_layers_that_peft_takes_for_those_of_experts_are_refused():
    with pytest.raises(UserError, match="PEFT takes model.layers.0.mlp.*_proj for an expert's layer.*q_proj k_proj"):
        make_model(
            "qwen3_moe",
            torch.bfloat16,
            "MXFP4",
            target_modules="all-linear",
            target_parameters=None,
            mlp_only_layers=[0],
        )


def test_experts_begin_as_peft_begins_them_only():
    with pytest.raises(UserError, match="--lora_init pissa is for linear layers.*--lora_init default"):
        make_model("qwen3_moe", torch.bfloat16, init_lora_weights="pissa")


def test_the_names_in_the_files_are_pefts(tmp_path):
    from peft import get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    expected = get_peft_model_state_dict(get_peft_model(make_mixture(layers=1), config))
    model = make_model("qwen3_moe", torch.bfloat16)
    names, factors = factor_names(model), factors_of(model)
    assert {names[n]: as_published(n, f).shape for n, f in factors.items()} == {n: t.shape for n, t in expected.items()}


def test_stacks_are_kept_as_peft_keeps_them_and_read_back():
    for name, shape in (("lora_A", (3, 4, 5)), ("lora_B", (3, 5, 4))):
        factor = torch.randn(shape)
        published = as_published(name, factor)
        assert published.ndim == 2 and torch.equal(from_published(name, published, factor.shape), factor)


def test_parameters_that_can_have_no_adapter_are_refused_by_name():
    with pytest.raises(
        UserError, match="--lora_target_parameters 'mlp.gate.weight' is no weight of experts.*gate_up_proj"
    ):
        make_model("qwen3_moe", torch.bfloat16, target_parameters=["mlp.gate.weight"])
    with pytest.raises(
        UserError, match="'mlp.experts.nosuch' is no weight of experts .* are mlp.experts.down_proj, mlp.experts.gate"
    ):
        make_model("qwen3_moe", torch.bfloat16, target_parameters=["mlp.experts.down_proj", "mlp.experts.nosuch"])
    with pytest.raises(UserError, match="keeps experts transposed, which PEFT does not know of"):
        make_model("llama4_text", torch.bfloat16, target_parameters=["feed_forward.experts.down_proj"])
