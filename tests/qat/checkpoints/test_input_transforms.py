"""Transformed inputs in packed folders: the file, the proof by compressed-tensors' code, and what refuses them."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.transform import TransformConfig
from helpers import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_families import logits_in_this_process
from torch import nn
from transformers import AutoModelForCausalLM

from qat import prepare_qat
from qat.checkpoints.engines import table_of_folder
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.input_transforms import load_transformed
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import load_packed
from qat.checkpoints.verify import verify
from qat.checkpoints.verify_logits import VerificationError
from qat.errors import UserError
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import quantizers_off
from qat.schemes.config import QATConfig
from training.arguments.distillation import DistillationArguments
from training.arguments.model import ModelArguments
from training.arguments.quantization import QuantizationArguments
from training.start.start import Start

same_process = pytest.fixture(logits_in_this_process)
BOTH = {"*.down_proj": "hadamard", "*.o_proj": "hadamard"}


def save_trained(folder, transforms, scheme="MXFP4", **kwargs):
    model = make_llama(layers=1, **kwargs).bfloat16()
    prepare_qat(model, {nn.Linear: scheme}, "lm_head", "search", "even", input_transforms=transforms)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder


def test_without_patterns_the_folder_transforms_no_layer_with_a_bias_and_is_proven(tmp_path, same_process):
    source = save_trained(tmp_path / "trained", "hadamard", attention_bias=True)
    folder = export_checkpoint(source, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    (group,) = TransformConfig.model_validate(config).config_groups.values()
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(group.apply[0].targets) == mlp
    tensors = load_file(folder / "model.safetensors")
    assert {name.partition(".hadamard32_input")[0] for name in tensors if "hadamard32" in name} == mlp
    assert {name.removesuffix(".bias") for name in tensors if name.endswith(".bias")}.isdisjoint(mlp)
    assert verify(folder, source)["logits"]["bit_equal"]


@pytest.mark.parametrize("transforms", [BOTH, {"*": "hadamard"}], ids=["two", "all"])
def test_a_folder_is_proven_with_transforms_by_the_library(tmp_path, same_process, transforms):
    source = save_trained(tmp_path / "trained", transforms)
    folder = export_checkpoint(source, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    (group,) = TransformConfig.model_validate(config).config_groups.values()
    assert (group.type, group.head_dim, group.apply[0].location) == ("random-hadamard", 32, "input")
    tensors = load_file(folder / "model.safetensors")
    matrices = [name for name in tensors if name.endswith(".hadamard32_input.weight")]
    assert len(matrices) == (7 if "*" in transforms else 2)
    logits = verify(folder, source)["logits"]
    assert logits["bit_equal"] and logits["mean_log_probability_difference_to_trained_rule"] == 0
    save_file(
        {**tensors, matrices[0]: tensors[matrices[0]] * 2}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(VerificationError, match="hadamard32_input"):
        verify(folder, source, with_logits=False)


def test_transformers_alone_refuses_the_folder_and_everything_says_how_to_load_it(tmp_path):
    source = save_trained(tmp_path / "trained", BOTH)
    folder = export_checkpoint(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="inputs need transforms: see README.md"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    helped, ids = load_transformed(folder, dtype=torch.bfloat16), torch.arange(64)[None]
    twin = prepare_as_saved(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), QATConfig.load(source))
    with torch.no_grad():
        assert torch.equal(helped(input_ids=ids).logits, twin(input_ids=ids).logits)
    card = (folder / "README.md").read_text()
    for text in (table_of_folder(folder), card):
        assert "it passes over transform_config" in text and "load_transformed(folder)" in text
    assert card.index("2 layers transform their inputs") < card.index("| base model |")
    assert "vLLM (0.32) does that without tensor parallelism" in table_of_folder(folder)
    assert "vLLM (0.32) does that without tensor parallelism" in card


def test_a_folder_without_transforms_stays_one_that_transformers_loads(tmp_path):
    folder = export_checkpoint(save_trained(tmp_path / "trained", {}), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quantization_status"] == "compressed" and "transform_config" not in config
    AutoModelForCausalLM.from_pretrained(folder)
    assert "transform" not in (folder / "README.md").read_text().replace("transformers", "")


def test_a_folder_with_transforms_is_not_unpacked(tmp_path):
    folder = export_checkpoint(save_trained(tmp_path / "trained", BOTH), tmp_path / "packed")
    with pytest.raises(UserError, match="has transformed inputs .* give the BF16 checkpoint"):
        load_packed(folder)
    (folder / "qat_config.json").unlink()  # as folders of others
    with pytest.raises(UserError, match="with a transform_config, .* which is not read"):
        load_packed(folder, rounds_again=False)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_folder_with_transforms_is_evaluated_with_its_values_as_they_are(tmp_path, autocast):
    source = save_trained(tmp_path / "trained", {"*": "hadamard"})
    model, config = load_packed(export_checkpoint(source, tmp_path / "packed"), rounds_again=False)
    dtype = torch.float32 if autocast else torch.bfloat16
    packed = prepare_as_saved(model.float() if autocast else model, config, keeps_values=True)
    trained = prepare_as_saved(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), config)
    ids = torch.arange(64)[None]
    embeddings = packed.get_input_embeddings()(ids).detach()
    found = []
    for each in (packed, trained):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = each.requires_grad_(False)(inputs_embeds=(x := embeddings.clone().requires_grad_())).logits
        (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        found.append((logits, x.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=float(found[1][1].abs().max()) * 2**-7)
    with quantizers_off(packed), quantizers_off(trained), torch.no_grad():
        off = [each(input_ids=ids).logits.float() for each in (packed, trained)]
    assert (off[0] - off[1]).norm() < 0.2 * off[1].norm()  # rounded weights, but no other function


def test_a_stage_that_rounds_the_weights_of_such_a_folder_again_is_refused(tmp_path):
    folder = export_checkpoint(save_trained(tmp_path / "trained", BOTH), tmp_path / "packed")
    start = Start.read(ModelArguments(str(folder)))
    start.check(QuantizationArguments(), DistillationArguments(), trains=False)
    assert start.keeps_values
    for settings, trains in ((QuantizationArguments(), True), (QuantizationArguments(quant_scheme="MXFP4"), False)):
        with pytest.raises(UserError, match="has transformed inputs"):
            start.check(settings, DistillationArguments(), trains)


def test_a_folder_that_transformers_saved_again_without_the_transforms_is_not_read(tmp_path):
    folder = export_checkpoint(save_trained(tmp_path / "trained", BOTH), tmp_path / "packed")
    load_transformed(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    for rounds_again in (True, False):
        with pytest.raises(UserError, match="has transformed inputs"):
            load_packed(tmp_path / "again", rounds_again=rounds_again)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["transform_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="inputs of 2 layers are transformed, and transform_config .* is missing"):
        load_packed(folder, rounds_again=False)
    with pytest.raises(UserError, match="has transformed inputs"):
        load_packed(folder)


@pytest.mark.parametrize("change", ["other values", "no matrix"])
def test_a_folder_whose_matrices_are_not_the_ones_is_not_evaluated(tmp_path, change):
    folder = export_checkpoint(save_trained(tmp_path / "trained", BOTH), tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("hadamard32_input.weight"))
    matrix = tensors.pop(name)
    tensors |= {name: -matrix} if change == "other values" else {}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not Sylvester's" if change == "other values" else "no matrix that transforms"):
        load_packed(folder, rounds_again=False)


def test_other_formats_refuse_them():
    model = prepare_qat(make_llama(layers=1), {nn.Linear: "MXFP4"}, input_transforms=BOTH)
    with pytest.raises(UserError, match="--export_format auto_round: .* has transformed inputs"):
        check_exportable(model, "auto_round")
    check_exportable(model, "compressed-tensors")
