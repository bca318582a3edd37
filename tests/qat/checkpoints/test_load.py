"""What may be loaded: ties as they are stored, parts of other models beside it, the files of a hub cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_llama, save_qat
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat.checkpoints.load import load_plain
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import load_packed
from qat.checkpoints.verify import verify
from training.arguments.model import ModelArguments
from training.start.start import Start

WEIGHTS = "model.safetensors"


def add(folder: Path, **tensors: torch.Tensor) -> Path:
    """Store more tensors; `__` in a name stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / WEIGHTS) | named, folder / WEIGHTS, {"format": "pt"})
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("stored", ["another head", "the embedding again"])
def test_a_head_that_is_stored_beside_a_tied_embedding_is_served_as_it_is_trained(tmp_path, stored):
    source = save_llama(tmp_path / "source", tie_word_embeddings=True)
    embedding = load_file(source / WEIGHTS)["model.embed_tokens.weight"]
    head = embedding.clone() if stored == "the embedding again" else embedding.flip(0)
    add(source, lm_head__weight=head)
    is_tied = stored == "the embedding again"
    model = load_plain(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert torch.equal(model.lm_head.weight, head) and model.config.tie_word_embeddings == is_tied
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP8")
    assert config_of(packed)["tie_word_embeddings"] == is_tied and verify(packed, source, with_logits=False)["verified"]
    assert torch.equal(load_packed(packed)[0].lm_head.weight, head)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(packed).lm_head.weight.bfloat16(), head)


@pytest.mark.parametrize(
    "name", ["v_head__weight", "model__vision_tower__weight", "model__layers__0__self_attn__rotary_emb__inv_freq"]
)
def test_tensors_outside_of_the_models_layers_are_logged_and_copied(tmp_path, caplog, name):
    source = add(save_llama(tmp_path / "source"), **{name: torch.ones(3)})
    name = name.replace("__", ".")
    load_plain(source)
    ignored_by_transformers = name.endswith("inv_freq")
    assert (f"1 tensors are no part of LlamaForCausalLM, e.g. {name}" in caplog.text) != ignored_by_transformers
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP8")
    assert f"1 tensors are no part of LlamaForCausalLM and are copied as they are, e.g. {name}" in caplog.text
    assert torch.equal(load_file(packed / WEIGHTS)[name], torch.ones(3))


def cached(folder: Path, source: Path, repository: str) -> Path:
    """A hub cache in `folder` that has `source` as its only model: blobs, and a snapshot of links to them."""
    root = folder / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, root / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    return snapshot


def test_a_hub_cache_is_read_by_id_and_as_a_folder_and_links_out_of_it_are_not(tmp_path):
    source = save_llama(tmp_path / "source")
    snapshot = cached(tmp_path / "cache", source, "org/tiny")
    expected = load_file(source / WEIGHTS)
    for name in ("org/tiny", str(snapshot)):
        start = Start.read(ModelArguments(name), str(tmp_path / "cache"))
        model, tokenizer = start.load_model(), start.load_tokenizer(64)
        assert torch.equal(model.model.norm.weight.bfloat16(), expected["model.norm.weight"]) and len(tokenizer) == 258
    packed = export_checkpoint(snapshot, tmp_path / "packed", scheme="MXFP4")
    assert (packed / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(source / "config.json")
    for name in ("org/tiny", str(snapshot)):
        with pytest.raises(ValueError, match="config.json is a link out of its folder"):
            Start.read(ModelArguments(name), str(tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["missing", "quantized", "adapter", "shape"])
def test_a_model_of_the_hub_is_held_to_the_same(tmp_path, damage):
    source = save_llama(tmp_path / "source")
    config = config_of(source)
    tensors = load_file(source / WEIGHTS)
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "quantized":
        config["quantization_config"] = {"quant_method": "awq"}
    elif damage == "adapter":
        (source / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    else:
        tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    cached(tmp_path / "cache", source, "org/tiny")
    said = {"missing": "lacks 1 tensors .* model.norm.weight", "quantized": "quantized by awq", "adapter": "org/base",
            "shape": r"model.norm.weight has the shape \(3,\)"}  # fmt: skip
    with pytest.raises(ValueError, match=f"--model_name_or_path 'org/tiny'.*{said[damage]}"):
        Start.read(ModelArguments("org/tiny"), str(tmp_path / "cache")).load_model()


def test_only_plain_files_go_with_an_export_and_code_only_where_it_may_run(tmp_path, caplog):
    source = save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP4"})
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").write_text("take it")
    (source / "LICENSE_x").symlink_to(tmp_path / "secret")
    (source / "own.py").write_text("print()")
    without = export_checkpoint(source, tmp_path / "without")
    assert (without / "LICENSE").is_file() and "LICENSE_x is not copied" in caplog.text
    assert not (without / "LICENSE_x").exists() and not (without / "own.py").exists()
    assert (export_checkpoint(source, tmp_path / "with", trust_remote_code=True) / "own.py").is_file()
