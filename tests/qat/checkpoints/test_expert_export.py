"""Experts in packed folders: names as engines ask for them, values as the layers compute with, and the proof."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import logits_in_this_process, make_family, save_family

from qat import get_scheme, prepare_qat
from qat.checkpoints import verify_logits
from qat.checkpoints.dialects.compressed_tensors import CompressedTensors
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs
from qat.numerics import ops

PREFIXES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "granitemoe": ("model.layers.0.block_sparse_moe.experts", ("gate_proj", "up_proj", "down_proj")),
    "llama4_text": ("model.layers.0.feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
    "nemotron_h": ("backbone.layers.1.mixer.experts", ("up_proj", "down_proj")),
}
FUSED_ONLY = "from fused tensors only"


same_process = pytest.fixture(logits_in_this_process, autouse=True)


def export(tmp_path: Path, kind: str, scheme, ignore=("lm_head",), **changes) -> tuple[Path, Path, dict]:
    """A family, packed: source, folder, and the quantization_config."""
    source = save_family(kind, tmp_path / "source", **changes)
    packed = export_checkpoint(source, tmp_path / "packed", "compressed-tensors", scheme, ignore)
    return source, packed, json.loads((packed / "config.json").read_text())["quantization_config"]


def vllm_scheme(config: dict, name: str, is_experts: bool = False) -> dict | None:
    """The group that vLLM finds for a name: `should_ignore_layer`, `find_matched_target` in its compressed_tensors."""

    def found(patterns):
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)

    if found(config["ignore"]):
        return None
    groups = config["config_groups"].values()
    by_name = next((group for group in groups if found(group["targets"])), None)
    return by_name or next((group for group in groups if "Linear" in group["targets"]), None)


@pytest.mark.parametrize("scheme", ["MXFP4", "INT4_G32", "FP8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nemotron_h", "llama4_text"])
def test_packed_experts_are_proven_bit_equal_through_transformers(tmp_path, kind, scheme):
    source, packed, _ = export(tmp_path, kind, scheme)
    verdict = verify(packed, source, tokens=24)
    assert verdict["verified"] and verdict["weights"]["elements_that_differ"] == 0
    assert verdict["weights"]["bytes_over_nominal"] < 1.2  # INT4 has shapes
    rule = verdict["logits"]["engine_activation_rules_of_experts"][scheme]
    if kind == "llama4_text":  # which transformers makes linear layers of
        assert rule == CompressedTensors().input_rule(get_scheme(scheme))
    else:
        assert rule is None
    if (kind, scheme) == ("llama4_text", "FP8"):
        assert "one scale for all tokens" in verdict["logits"]["why_not_bit_equal"]
    else:
        assert verdict["logits"]["bit_equal"] and verdict["why_no_logits"] is None


@pytest.mark.parametrize("kind", PREFIXES)
def test_each_matrix_is_packed_under_the_name_that_engines_ask_for(tmp_path, kind):
    source, packed, config = export(tmp_path, kind, "MXFP4")
    prefix, projections = PREFIXES[kind]
    tensors = load_file(packed / "model.safetensors")
    experts = {name for name in tensors if name.startswith(f"{prefix}.")}
    assert experts == {
        f"{prefix}.{expert}.{projection}.{tensor}"
        for expert in range(3) for projection in projections for tensor in ("weight_packed", "weight_scale")
    }  # fmt: skip
    for name in (*projections, "None"):  # of models without a gate vLLM asks for "None" as well
        assert vllm_scheme(config, f"{prefix}.0.{name}")["format"] == "mxfp4-pack-quantized"


def test_a_fused_tensor_is_split_into_gate_and_up_of_each_expert(tmp_path):
    source, packed, _ = export(tmp_path, "granitemoe", "MXFP4")
    fused = load_file(source / "model.safetensors")["model.layers.0.block_sparse_moe.input_linear.weight"]
    tensors = load_file(packed / "model.safetensors")
    spec = get_scheme("MXFP4").weight
    for projection, rows in (("gate_proj", fused[2, :64]), ("up_proj", fused[2, 64:])):
        name = f"model.layers.0.block_sparse_moe.experts.2.{projection}.weight"
        found = CompressedTensors().decompress([tensors[f"{name}_packed"], tensors[f"{name}_scale"]], spec)
        assert torch.equal(found, ops.fake_quantize(rows, "mxfp4", spec.rule, torch.bfloat16))


def test_fused_files_of_a_family_that_has_single_ones_as_well_are_loaded_again(tmp_path):
    source = save_family("qwen3_moe", tmp_path / "source")
    tensors, model = load_file(source / "model.safetensors"), make_family("qwen3_moe")
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    fused = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    save_file(plain | fused, source / "model.safetensors", metadata={"format": "pt"})
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP4")
    assert "model.layers.0.mlp.experts.2.up_proj.weight_packed" in load_file(packed / "model.safetensors")
    assert verify(packed, source, tokens=24)["logits"]["bit_equal"]


def test_interleaved_transposed_experts_are_taken_apart(tmp_path):
    source, packed, _ = export(tmp_path, "gpt_oss", "MXFP4A16")
    fused = load_file(source / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    tensors = load_file(packed / "model.safetensors")
    name, spec = "model.layers.0.mlp.experts.1.up_proj.weight", get_scheme("MXFP4A16").weight
    found = CompressedTensors().decompress([tensors[f"{name}_packed"], tensors[f"{name}_scale"]], spec)
    assert torch.equal(found, ops.fake_quantize(fused[1, :, 1::2].T.contiguous(), "mxfp4", spec.rule, torch.bfloat16))
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in tensors
    verdict = verify(packed, source, tokens=8)
    assert verdict["verified"] and FUSED_ONLY in verdict["why_no_logits"]


def test_nvfp4_has_one_divisor_an_expert_and_one_for_the_inputs_of_a_layer(tmp_path):
    model = prepare_qat(make_family("mixtral"), {"torch.nn.Linear": "NVFP4"})
    calibrate_inputs(model, [{"input_ids": torch.arange(64)[None]}])
    model.save_pretrained(tmp_path / "source")
    model.qat_config.save(tmp_path / "source")
    packed = export_checkpoint(tmp_path / "source", tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    scales = model.qat_config.calibrated_scales
    name = "model.layers.0.block_sparse_moe.experts"
    for expert in range(3):
        gate, up = (tensors[f"{name}.{expert}.{own}.weight_global_scale"] for own in ("w1", "w3"))
        assert torch.equal(gate, up) and gate.shape == (1,)
        for own, projection in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
            found = tensors[f"{name}.{expert}.{own}.input_global_scale"]
            assert float(found) == scales[f"model.layers.0.mlp.experts.{projection}.input_global_scale"]
    assert len({float(tensors[f"{name}.{expert}.w2.weight_global_scale"]) for expert in range(3)}) == 3
    verdict = verify(packed, tmp_path / "source", tokens=8)
    assert verdict["verified"] and "weight_global_scale" in verdict["why_no_logits"]


@pytest.mark.parametrize("kind", PREFIXES)
def test_experts_left_alone_are_ignored_under_every_name_that_is_asked_for(tmp_path, kind, caplog):
    source, packed, config = export(tmp_path, kind, "MXFP4", ("lm_head", "*.experts"))
    prefix, projections = PREFIXES[kind]
    assert all(vllm_scheme(config, f"{prefix}.0.{name}") is None for name in projections)
    router = {"llama4_text": "router", "granitemoe": "router.layer"}.get(kind, "gate")
    assert vllm_scheme(config, f"{prefix.removesuffix('.experts')}.{router}") is None
    assert sum("experts" in name for name in config["ignore"]) <= 2
    with caplog.at_level(logging.WARNING):
        verdict = verify(packed, source, tokens=8)
    assert verdict["verified"]
    if kind == "granitemoe":
        assert verdict["logits"]["bit_equal"]
    else:
        assert verdict["logits"] is None and verdict["why_no_logits"].startswith("transformers cannot load the folder")
        assert "the weights are proven, the logits are not" in caplog.text


def test_a_folder_that_loads_in_spite_of_a_known_cause_is_not_said_not_to_load(tmp_path, monkeypatch):
    source, packed, _ = export(tmp_path, "mixtral", "MXFP4")
    monkeypatch.setattr("qat.checkpoints.verify.why_not_loadable", lambda *args: "a cause")
    assert verify(packed, source, tokens=8)["logits"]["bit_equal"]
    other = {"bit_equal": False, "why_not_bit_equal": None, "largest_difference": 0.5}
    monkeypatch.setattr("qat.checkpoints.verify.LogitsProof.finish", lambda *args: other)
    said = "transformers does not load the folder as it is packed (its logits differ by up to 0.5): a cause"
    assert verify(packed, source, tokens=8)["why_no_logits"] == said


def test_experts_beside_layers_in_another_scheme_are_found_by_patterns(tmp_path):
    source, packed, config = export(tmp_path, "mixtral", {"torch.nn.Linear": "MXFP8", "*.experts": "MXFP4"})
    name = "model.layers.0.block_sparse_moe.experts.2.w3"
    assert vllm_scheme(config, name)["format"] == "mxfp4-pack-quantized"
    assert vllm_scheme(config, "model.layers.0.self_attn.q_proj")["format"] == "mxfp8-quantized"
    assert verify(packed, source, tokens=24)["logits"]["bit_equal"]


def test_experts_in_several_schemes_are_proven_by_their_weights(tmp_path):
    mapping = {"torch.nn.Linear": "MXFP4", "layers.1.mlp.experts": "INT4_G32"}
    source, packed, config = export(tmp_path, "mixtral", mapping, num_hidden_layers=2)
    assert vllm_scheme(config, "model.layers.1.block_sparse_moe.experts.0.w1")["format"] == "pack-quantized"
    verdict = verify(packed, source, tokens=8)
    assert verdict["verified"] and "one scheme for all experts" in verdict["why_no_logits"]


def test_one_changed_bit_of_one_expert_is_found(tmp_path):
    source, packed, _ = export(tmp_path, "qwen3_moe", "MXFP4")
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.down_proj.weight_packed"][3, 5] ^= 0x10
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(verify_logits.VerificationError, match=r"first in .*experts[.]1[.]down_proj[.]weight"):
        verify(packed, source, tokens=8)


@pytest.mark.parametrize(
    ("ignore", "said"),
    [(("lm_head",), "experts.gate_up_proj holds experts"), (("*.experts", "lm_head"), "leave experts alone")],
)
def test_auto_rounds_format_holds_no_experts(tmp_path, ignore, said):
    source = save_family("qwen3_moe", tmp_path / "source")
    with pytest.raises(UserError, match=said):
        export_checkpoint(source, tmp_path / "packed", "auto_round", "MXFP4", ignore)
    assert not (tmp_path / "packed").exists()
