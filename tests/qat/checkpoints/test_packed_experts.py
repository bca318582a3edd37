"""Packed experts in: folders of other programs, which pack the matrices of experts one by one, start QAT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gpt_oss_folders import E2M1
from helpers import make_mixture, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qat import prepare_qat
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.packed_folder import check_packed, check_packed_values
from qat.checkpoints.unpack import load_packed
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import EXPERTS, find_sites, quantized_sites
from qat.numerics import ops
from qat.schemes.presets import get_scheme

WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
EXPERT = re.compile(r".*experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
IDS = torch.arange(64)[None]


def save_packed(folder: Path, family: str, which: str = ".*", inputs: dict | None = None) -> dict[str, torch.Tensor]:
    """A folder as llm-compressor writes it: experts whose names match `which` in random MXFP4.

    Returns:
        The values of the packed weights, BF16, by the names that they had.
    """
    model = make_mixture(family).bfloat16()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if EXPERT.fullmatch(name) and re.fullmatch(which, name)]:
        rows, columns = tensors.pop(name).shape
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        scales = torch.randint(119, 123, (rows, columns // 32), dtype=torch.uint8)
        elements = E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()]
        values[name] = (elements * 2.0 ** (scales.float() - 127).repeat_interleave(32, dim=-1)).bfloat16()
        tensors |= {f"{name}_packed": codes, f"{name}_scale": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "format": "mxfp4-pack-quantized", "weights": WEIGHTS, "input_activations": inputs}
    settings = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"g": group}}
    write_settings(folder, settings | {"ignore": ["re:.*self_attn.*", "lm_head"]})
    return values


def write_settings(folder: Path, settings: dict) -> None:
    """Let config.json have these quantization settings."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize(("family", "names"), [("qwen3_moe", "gate_proj up_proj down_proj"), ("mixtral", "w1 w3 w2")])
def test_experts_of_other_programs_load_exactly_and_are_prepared_in_their_scheme(tmp_path, family, names):
    values = save_packed(tmp_path, family)
    check_packed_values(tmp_path)
    model, config = load_packed(tmp_path)
    assert config.mapping == {"torch.nn.Linear": "MXFP4A16"}
    assert "model.layers.0.self_attn.q_proj" in config.ignore
    gate, up, down = names.split()
    prefix = "model.layers.1.mlp.experts" if family == "qwen3_moe" else "model.layers.1.block_sparse_moe.experts"
    experts = model.model.layers[1].mlp.experts
    for expert in range(4):
        own = [values[f"{prefix}.{expert}.{name}.weight"] for name in (gate, up, down)]
        assert torch.equal(experts.gate_up_proj[expert], torch.cat(own[:2]))
        assert torch.equal(experts.down_proj[expert], own[2])
    with torch.no_grad():
        before = model(IDS).logits
    sites = quantized_sites(prepare_as_saved(model, config, keeps_values=True))
    assert [site.kind for site in sites] == [EXPERTS.name] * 4
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_experts_of_one_layer_must_all_be_packed_and_in_one_scheme(tmp_path):
    save_packed(tmp_path / "part", "qwen3_moe", which=r"(?!.*layers\.1.*experts\.2\.up_proj).*")
    with pytest.raises(
        ValueError, match=r"experts of model.layers.1.mlp.experts differ: .*2.up_proj in no packed format"
    ):
        check_packed(tmp_path / "part")
    save_packed(tmp_path / "layer", "qwen3_moe", which=r".*layers\.1\..*")  # all of a layer, none of another
    config = load_packed(tmp_path / "layer")[1]
    assert "model.layers.0.mlp.experts" in config.ignore and config.mapping == {"torch.nn.Linear": "MXFP4A16"}
    save_packed(tmp_path / "schemes", "mixtral")
    settings = json.loads((tmp_path / "schemes" / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["g"]
    settings["config_groups"]["h"] = {**group, "targets": [r"re:.*experts\.1\.w2"], "input_activations": WEIGHTS}
    write_settings(tmp_path / "schemes", settings)
    with pytest.raises(ValueError, match=r"experts of model.layers.0.mlp.experts differ: .*experts.1.w2 is in MXFP4,"):
        check_packed(tmp_path / "schemes")


def test_experts_that_are_missing_or_of_another_shape_are_refused_by_name(tmp_path):
    save_packed(tmp_path, "qwen3_moe")
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.3.down_proj.weight"
    lacking = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: it has 3 tensors of model.layers.0.mlp.experts.down_proj"):
        check_packed(tmp_path)
    short = tensors | {f"{name}_{part}": tensors[f"{name}_{part}"][:32].clone() for part in ("packed", "scale")}
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.3.down_proj is a weight \(32, 96\), and .* 4 experts of \(64, 96\)"):
        check_packed(tmp_path)


def save_plain(folder: Path, family: str) -> Path:
    """A tiny mixture in BF16, its weights large enough for all formats."""
    model = make_mixture(family).bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "scheme", "export_format"),
    [("gpt_oss", "MXFP8", "compressed-tensors"), ("granitemoe", "MXFP4", "auto"), ("mixtral", "NVFP4A16", "auto")],
)
def test_our_own_folders_start_again_in_families_whose_files_have_fused_experts_too(
    tmp_path, family, scheme, export_format
):
    source = save_plain(tmp_path / "source", family)
    packed = export_checkpoint(source, tmp_path / "packed", export_format, scheme)
    model, config = load_packed(packed)
    spec, expected = get_scheme(scheme).weight, AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for site in (site for site in find_sites(expected) if site.kind == EXPERTS.name):
        is_transposed = family == "gpt_oss"
        found, weights = (own.get_parameter(site.tensor).detach() for own in (model, expected))
        for own, weight in zip(found, weights, strict=True):
            rows = (weight.t() if is_transposed else weight).contiguous()
            divisor = [448.0 * 6.0 / rows.abs().max().float().reshape(1)] if spec.format.tensor_scale else []
            rounded = ops.fake_quantize(rows, spec.format.name, spec.rule, torch.bfloat16, *divisor)
            assert torch.equal(own.t() if is_transposed else own, rounded), site.tensor
    (packed / "qat_config.json").unlink()
    again, derived = load_packed(packed)
    assert derived.mapping == config.mapping == {"torch.nn.Linear": scheme}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_inputs_of_experts_take_the_scale_with_which_no_expert_saturates(tmp_path, caplog):
    source = save_plain(tmp_path / "source", "qwen3_moe")
    model = prepare_qat(AutoModelForCausalLM.from_pretrained(source), {"*.experts": "NVFP4"})
    scales = {f"{site.label}.input_global_scale": 48.5 for site in quantized_sites(model)}
    packed = export_checkpoint(
        source, tmp_path / "packed", scheme={"*.experts": "NVFP4"}, calibrated_scales=scales
    )  # fmt: skip
    assert load_packed(packed)[1].calibrated_scales == scales
    tensors, one = load_file(packed / "model.safetensors"), "model.layers.1.mlp.experts.2.up_proj.input_global_scale"
    assert tensors[one].tolist() == [48.5]
    save_file(tensors | {one: torch.tensor([32.25])}, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="contradicts the scales"):
        load_packed(packed)
    (packed / "qat_config.json").unlink()
    found = load_packed(packed)[1].calibrated_scales
    assert found == scales | {"model.layers.1.mlp.experts.gate_up_proj.input_global_scale": 32.25}
    assert "all of them take 32.25" in caplog.text


@pytest.mark.parametrize("mapping", [{"torch.nn.Linear": "MXFP4"}, {"*.q_proj": "MXFP4"}])
def test_autorounds_format_of_a_mixture_is_refused_before_training(mapping):
    model = make_mixture("mixtral")
    with pytest.raises(ValueError, match="auto_round: .*experts.*; use the export format compressed-tensors"):
        check_exportable(prepare_qat(model, mapping), "auto_round")


def test_a_folder_with_experts_and_linear_layers_in_two_schemes_is_told_apart_without_our_config(tmp_path):
    source = save_plain(tmp_path / "source", "mixtral")
    mapping = {"torch.nn.Linear": "MXFP8", "*.experts": "MXFP4A16"}
    packed = export_checkpoint(source, tmp_path / "packed", scheme=mapping)
    (packed / "qat_config.json").unlink()
    found = load_packed(packed)[1].mapping
    experts = {f"model.layers.{layer}.mlp.experts": "MXFP4A16" for layer in range(2)}
    assert found == {"torch.nn.Linear": "MXFP8"} | experts


def test_packed_layers_of_gpt2_are_put_into_its_transposed_weights(tmp_path):
    sizes = {"vocab_size": 260, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_inner": 96}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).bfloat16().save_pretrained(
        tmp_path / "plain"
    )
    packed = export_checkpoint(tmp_path / "plain", tmp_path / "packed", scheme="MXFP4A16")
    model, config = load_packed(packed)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").get_parameter("transformer.h.0.mlp.c_fc.weight")
    rounded = ops.fake_quantize(before.detach().t().contiguous(), "mxfp4", "floor", torch.bfloat16).t()
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, rounded)
    (packed / "qat_config.json").unlink()
    assert load_packed(packed)[1].mapping == config.mapping
