"""Packed folders of models whose files have other names than their modules; and whether transformers can load them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import logits_in_this_process, make_family, save_family
from transformers import AutoModelForCausalLM

from qat import prepare_qat
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.errors import UserError

HEAD = ("lm_head",)
TOWERS = (*HEAD, "re:.*vision_tower.*", "re:.*multi_modal_projector.*")


same_process = pytest.fixture(logits_in_this_process, autouse=True)


def skeleton_of(kind):
    """Without weights, as a run begins."""
    config = make_family(kind).config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "ignore", "packed_name", "left_name"),
    [
        ("qwen3_5", HEAD, "model.language_model.layers.0.mlp.up_proj", "model.visual.blocks.0.attn.qkv"),
        ("gemma3", TOWERS[:2], "language_model.model.layers.0.mlp.up_proj", "vision_tower.encoder.layers.0.mlp.fc1"),
        ("nemotron_h", HEAD, "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.gate"),
    ],
)
def test_published_names_stay_and_transformers_computes_the_same(tmp_path, kind, ignore, packed_name, left_name):
    source = save_family(kind, tmp_path / "source")
    mapping = {"torch.nn.Linear": "MXFP4", "*.up_proj": "MXFP8A16"} if kind == "gemma3" else "MXFP4"
    packed = export_checkpoint(source, tmp_path / "packed", scheme=mapping, ignore=ignore)
    tensors = load_file(packed / "model.safetensors")
    assert f"{packed_name}.weight_scale" in tensors and f"{left_name}.weight" in tensors
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert left_name in config["ignore"]
    if kind == "gemma3":
        (targets,) = (g["targets"] for g in config["config_groups"].values() if g["format"] == "mxfp8-quantized")
        assert targets == [packed_name, "model.language_model.layers.0.mlp.up_proj"]
    verdict = verify(packed, source, tokens=24)
    assert verdict["verified"] and verdict["logits"]["bit_equal"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("zamba2", "transformers does not tie packed weights"),
        ("kimi_linear", "drops what is not packed"),
        ("mamba2", "_init_weights in modeling_mamba2.py"),
    ],
)
def test_a_cause_in_transformers_loader_leaves_the_weights_proven(tmp_path, kind, said, caplog):
    source = save_family(kind, tmp_path / "source")
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP4")
    with caplog.at_level(logging.WARNING):
        verdict = verify(packed, source, tokens=8)
    assert verdict["verified"] and verdict["logits"] is None and verdict["weights"]["elements_that_differ"] == 0
    assert said in verdict["why_no_logits"] and verdict == json.loads((packed / "verification.json").read_text())
    (line,) = [r.getMessage() for r in caplog.records if "the logits are not" in r.getMessage()]
    assert "\n" not in line and said in line


def test_a_tower_that_is_left_alone_does_not_keep_transformers_from_loading_the_folder(tmp_path):
    source = save_family("gemma3", tmp_path / "source")
    verdict = verify(export_checkpoint(source, tmp_path / "packed", scheme="MXFP4"), source, tokens=8)
    assert verdict["verified"] and verdict["logits"]["bit_equal"]
    assert any("(outside of the language model)" in line for line in verdict["left_unquantized"])


def test_layers_that_share_a_weight_are_packed_once_and_must_agree(tmp_path):
    source = save_family("zamba2", tmp_path / "source")
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP4")
    tensors = load_file(packed / "model.safetensors")
    assert sum("shared_transformer.self_attn.q_proj.weight_packed" in name for name in tensors) == 1
    mapping = {"torch.nn.Linear": "MXFP4", "layers.2.shared_transformer.self_attn.q_proj": "MXFP8"}
    with pytest.raises(UserError, match="shares its weight with .* differ in scheme .*MXFP8, MXFP4"):
        export_checkpoint(source, tmp_path / "mixed", scheme=mapping)


@pytest.mark.parametrize(
    ("kind", "ignore", "said"),
    [
        ("llama", HEAD, None),
        ("mixtral", HEAD, None),
        ("llama4_text", HEAD, None),
        ("nemotron_h", HEAD, None),
        ("mixtral", (*HEAD, "*.experts"), "drops what is not packed"),
        ("granitemoe", HEAD, "from fused tensors only"),
        ("llama4_text", (*HEAD, "*.experts"), "unquantized and fused"),
        ("mamba2", HEAD, "_init_weights in modeling_mamba2.py"),
        ("zamba2", HEAD, "does not tie"),
    ],
)
@pytest.mark.parametrize("with_folder", [True, False])
def test_the_dry_run_warns_once_of_what_transformers_cannot_load(tmp_path, caplog, kind, ignore, said, with_folder):
    save_family(kind, tmp_path)
    model = prepare_qat(skeleton_of(kind), {"torch.nn.Linear": "MXFP4"}, ignore)
    names = set(model.state_dict())
    caplog.clear()  # of a small share
    folder = CheckpointFolder.open(tmp_path) if with_folder else None
    with caplog.at_level(logging.WARNING, logger="qat"):
        check_exportable(model, "compressed-tensors", folder)
    assert len(caplog.records) == (said is not None) and (said or "") in caplog.text
    assert set(model.state_dict()) == names


def test_the_dry_run_changes_no_random_numbers():
    model = prepare_qat(skeleton_of("mamba2"), {"torch.nn.Linear": "MXFP4"})
    before = torch.get_rng_state()
    check_exportable(model, "compressed-tensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dry_run_refuses_a_weight_that_the_files_do_not_have(tmp_path):
    source = save_family("llama", tmp_path)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = prepare_qat(skeleton_of("llama"), {"torch.nn.Linear": "MXFP4"})
    with pytest.raises(UserError, match="has no tensor model.layers.0.mlp.up_proj.weight"):
        check_exportable(model, "compressed-tensors", CheckpointFolder.open(source))
