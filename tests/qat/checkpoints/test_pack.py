"""Packed export: bytes, files, refusals; nothing half is ever left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from helpers import make_llama, make_tokenizer, save_llama, save_qat
from safetensors.torch import load_file, save_file

from qat import SCHEMES, get_scheme, prepare_qat
from qat.checkpoints.dialects import get_dialect
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.model_card import CardFacts
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.pack_tensors import pack_weight
from qat.checkpoints.shard_writer import ShardWriter
from qat.checkpoints.tensor_scales import added_tensors
from qat.checkpoints.verify import verify
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs, calibrated_layers
from qat.numerics import ops
from qat.schemes.config import QATConfig
from qat.schemes.spec import TensorSpec

MIXED = {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny QAT checkpoint, mixed precision, one layer ignored, with biases."""
    folder = tmp_path_factory.mktemp("export") / "source"
    model = prepare_qat(make_llama(attention_bias=True).bfloat16(), MIXED, ("lm_head", "layers.0.self_attn.o_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_text("not part of a served model")
    (folder / "all_results.json").write_text(json.dumps({"eval_perplexity": 12.5}))
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def weight(rows: int = 48, columns: int = 96) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return (values * torch.logspace(-6, 3, rows)[:, None]).bfloat16()


@pytest.mark.parametrize(("data_type", "bits"), [("mx_fp", 4), ("mx_fp", 8), ("mx_fp_rceil", 4), ("mx_fp_rceil", 8)])
def test_packed_bytes_equal_auto_rounds(data_type, bits):
    from auto_round.data_type.utils import get_quant_func
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear

    linear = torch.nn.Linear(96, 48, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight()
    quantize, _ = get_quant_func(data_type, bits, True)
    values, exponent, _ = quantize(tensor=linear.weight.data.clone(), bits=bits, group_size=32)
    linear.weight.data = values
    theirs = QuantLinear(bits, 32, 96, 48, False, data_type=data_type, act_bits=bits)
    theirs.pack(linear, exponent.reshape(48, 3), device="cpu")

    ours = pack_weight(weight(), TensorSpec.of(data_type, bits))
    their_codes = theirs.weight_packed if bits == 4 else theirs.weight
    assert torch.equal(ours.codes, their_codes.view(torch.uint8))
    assert torch.equal(ours.scales[0], theirs.weight_scale)


@pytest.mark.parametrize("export_format", ["compressed-tensors", "auto_round"])
def test_everything_but_packed_weights_is_copied_bit_for_bit(source, tmp_path, export_format):
    packed = load_file(export_checkpoint(source, tmp_path / "packed", export_format) / "model.safetensors")
    plain = load_file(source / "model.safetensors")
    assert packed["model.layers.0.mlp.up_proj.weight_packed"].shape == (96, 32)
    assert packed["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert packed["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.uint8
    kept = {name for name in plain if f"{name.removesuffix('.weight')}.weight_scale" not in packed}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"} <= kept
    assert any(name.endswith("q_proj.bias") for name in kept) and "lm_head.weight" not in packed
    assert all(torch.equal(packed[name], plain[name]) for name in kept)


def test_the_folder_is_complete_and_the_card_tells_where_it_comes_from(source, tmp_path):
    facts = CardFacts("meta-llama/Llama-3.2-1B", "python-docs")
    folder = export_checkpoint(source, tmp_path / "MX", facts=facts)
    files = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "qat_config.json"} <= files
    assert "optimizer.pt" not in files
    card = (folder / "README.md").read_text()
    assert "base_model: meta-llama/Llama-3.2-1B\n" in card
    for said in ("*.down_proj: MXFP8", "python-docs", "FLOOR", "12.5", "vllm serve"):
        assert said in card, said
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert {tuple(g["targets"]) for g in config["quantization_config"]["config_groups"].values()} >= {
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    }
    assert config["quantization_config"]["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]


def test_a_sharded_checkpoint_stays_sharded(source, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(source, sharded)
    (sharded / "model.safetensors").unlink()
    model = make_llama(attention_bias=True).bfloat16()
    model.save_pretrained(sharded, max_shard_size="60KB")
    folder = export_checkpoint(sharded, tmp_path / "packed")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for file in set(index.values()):
        assert set(load_file(folder / file)) == {name for name, where in index.items() if where == file}
    assert verify(folder, sharded, with_logits=False)["weights"]["elements_that_differ"] == 0


def test_a_single_file_of_another_name_gets_an_index_as_its_source_has_one(source, tmp_path):
    single, name = tmp_path / "single", "model-00001-of-00001.safetensors"
    shutil.copytree(source, single)
    (single / "model.safetensors").rename(single / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(single / name), name)}
    (single / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = export_checkpoint(single, tmp_path / "packed")
    assert verify(folder, single, with_logits=False)["verified"]
    assert CheckpointFolder.open(folder).shards.keys() == {name}


def test_a_plain_checkpoint_in_fp32_is_packed_from_its_bf16_view(tmp_path):
    plain = save_llama(tmp_path / "plain", dtype=torch.float32)
    folder = export_checkpoint(plain, tmp_path / "packed", scheme="MXFP8")
    tensors, original = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    layer = "model.layers.1.mlp.gate_proj"
    expected = ops.fake_quantize(original[f"{layer}.weight"].bfloat16(), "mxfp8", "floor", torch.bfloat16)
    packed = [tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]]
    assert torch.equal(get_dialect("compressed-tensors").decompress(packed, get_scheme("MXFP8").weight), expected)
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


# ---- Scales of whole tensors ----


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A plain checkpoint in shards that separate fused layers, and calibrated scales for its inputs in NVFP4."""
    folder = tmp_path_factory.mktemp("nvfp4") / "plain"
    model = make_llama(layers=1).bfloat16()
    with torch.no_grad():
        for name, factor in (("q_proj", 0.5), ("k_proj", 3.0), ("v_proj", 2.0), ("gate_proj", 0.25), ("up_proj", 1.0)):
            next(p for n, p in model.named_parameters() if f"{name}.weight" in n).mul_(factor)
    model.save_pretrained(folder, max_shard_size="9KB")
    make_tokenizer().save_pretrained(folder)
    prepared = prepare_qat(make_llama(layers=1), {"torch.nn.Linear": "NVFP4"})
    inputs = {"q_proj": 40.25, "k_proj": 40.25, "v_proj": 40.25, "o_proj": 11.5, "down_proj": 1.0 / 3.0}
    scales = {f"{n}.input_global_scale": inputs.get(n.split(".")[-1], 8.0) for n in calibrated_layers(prepared)}
    return folder, {name: float(torch.tensor(scale)) for name, scale in scales.items()}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_fused_layers_in_different_shards_share_the_divisor_of_the_largest(nvfp4, tmp_path):
    source, scales = nvfp4
    assert len(list(source.glob("*.safetensors"))) > 4
    folder = export_checkpoint(source, tmp_path / "packed", scheme="NVFP4", calibrated_scales=scales)
    tensors, plain = all_tensors(folder), all_tensors(source)
    for parent, group in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        names = [f"model.layers.0.{parent}.{own}" for own in group]
        amax = torch.stack([plain[f"{name}.weight"].abs().max() for name in names]).max().float()
        assert {float(tensors[f"{name}.weight_global_scale"]) for name in names} == {float(448.0 * 6.0 / amax)}
    own = tensors["model.layers.0.mlp.down_proj.weight_global_scale"]
    assert own == 448.0 * 6.0 / plain["model.layers.0.mlp.down_proj.weight"].abs().max().float()
    assert verify(folder, source, with_logits=False)["weights"]["elements_that_differ"] == 0


def test_calibrated_scales_are_tensors_beside_their_layers_and_in_the_configuration(nvfp4, tmp_path):
    source, scales = nvfp4
    folder = export_checkpoint(source, tmp_path / "packed", scheme="NVFP4", calibrated_scales=scales)
    tensors, index = all_tensors(folder), json.loads((folder / "model.safetensors.index.json").read_text())
    for name, scale in scales.items():
        assert tensors[name].dtype == torch.float32 and tensors[name].tolist() == [scale]
        beside = name.replace("input_global_scale", "weight_packed")
        assert index["weight_map"][name] == index["weight_map"][beside]
    assert QATConfig.load(folder).calibrated_scales == scales


def test_scales_of_a_cache_lie_beside_the_first_tensor_of_their_attention(nvfp4):
    checkpoint = CheckpointFolder.open(nvfp4[0])
    placed = added_tensors(checkpoint, {"model.layers.0.self_attn.k_scale": 0.1}, {})
    (file,) = (file for file, tensors in placed.items() if tensors)
    assert file == next(f for f, names in checkpoint.shards.items() if any(".self_attn." in name for name in names))
    (scale,) = placed[file].values()
    assert scale.dtype == torch.float32 and scale.shape == (1,)


def test_a_weight_only_layer_among_fused_ones_needs_no_calibrated_scale(nvfp4, tmp_path):
    source, scales = nvfp4
    others = {name: scale for name, scale in scales.items() if "k_proj" not in name}
    mapping = {"torch.nn.Linear": "NVFP4", "*.k_proj": "NVFP4A16"}
    folder = export_checkpoint(source, tmp_path / "packed", scheme=mapping, calibrated_scales=others)
    stored = {name for name in CheckpointFolder.open(folder).names if name.endswith(".input_global_scale")}
    assert stored == others.keys() and len(stored) == len(scales) - 1


def test_inputs_that_were_not_calibrated_are_refused_with_the_remedy(nvfp4, tmp_path):
    source, scales = nvfp4
    with pytest.raises(UserError, match="q_proj is in NVFP4, .* has none; give --dataset .* NVFP4A16"):
        export_checkpoint(source, tmp_path / "packed", scheme="NVFP4")
    untied = {name: 2.0 * scale if "k_proj" in name else scale for name, scale in scales.items()}
    with pytest.raises(UserError, match=r"different scales for the same input \(40.25, 80.5\); calibrate again"):
        export_checkpoint(source, tmp_path / "packed", scheme="NVFP4", calibrated_scales=untied)
    with pytest.raises(UserError, match="for no layer, model.nowhere.input_global_scale"):
        export_checkpoint(
            source,
            tmp_path / "packed",
            scheme="NVFP4",
            calibrated_scales={**scales, "model.nowhere.input_global_scale": 1},
        )
    assert not list(tmp_path.iterdir())
    export_checkpoint(source, tmp_path / "packed", scheme="NVFP4A16")


def test_a_trained_checkpoint_brings_its_calibrated_scales_under_its_own_scheme_by_name_too(nvfp4, tmp_path):
    _, scales = nvfp4
    source = save_qat(tmp_path / "source", {"torch.nn.Linear": "NVFP4"}, layers=1)
    config = QATConfig.load(source)
    replace(config, calibrated_scales=scales).save(source)
    for target, scheme in (("own", None), ("named", "NVFP4")):
        folder = export_checkpoint(source, tmp_path / target, scheme=scheme)
        assert {n: t.item() for n, t in all_tensors(folder).items() if "input_global" in n} == scales


def test_layers_of_another_format_than_those_they_are_fused_with_are_packed_with_a_warning(nvfp4, tmp_path, caplog):
    source, _ = nvfp4
    mapping = {"torch.nn.Linear": "NVFP4A16", "*.k_proj": "INT4_G32"}
    folder = export_checkpoint(source, tmp_path / "packed", scheme=mapping)
    assert "q_proj, k_proj, v_proj differ in scheme; vLLM fuses them and will refuse" in caplog.text
    tensors, plain = all_tensors(folder), all_tensors(source)
    amax = max(float(plain[f"model.layers.0.self_attn.{own}.weight"].abs().max()) for own in ("q_proj", "v_proj"))
    for own in ("q_proj", "v_proj"):
        divisor = tensors[f"model.layers.0.self_attn.{own}.weight_global_scale"]
        assert float(divisor) == float(448.0 * 6.0 / torch.tensor(amax))
    assert verify(folder, source, with_logits=False)["verified"]


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if not name.endswith("G128")])  # 64 inputs a layer
def test_each_scheme_is_packed_beside_another_in_the_same_attention_layer(tmp_path, scheme):
    other = "NVFP4" if scheme == "MXFP8" else "MXFP8"
    model = make_llama(layers=1, attention_bias=True).bfloat16()
    prepare_qat(model, {"torch.nn.Linear": scheme, "*.k_proj": other})
    calibrate_inputs(model, [{"input_ids": torch.arange(20)[None]}])
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    model.qat_config.save(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "packed")
    assert verify(tmp_path / "packed", tmp_path / "source", with_logits=False)["verified"]


@pytest.mark.parametrize("scheme", ["INT4_G128", "MXFP4FP8_G128"])
def test_layers_that_the_blocks_do_not_divide_are_named(nvfp4, tmp_path, scheme):
    said = f"layers.0.self_attn.q_proj: in_features that the blocks of {scheme} do not divide"
    with pytest.raises(UserError, match=f"nothing to quantize.*{said}"):
        export_checkpoint(nvfp4[0], tmp_path / "packed", scheme=scheme)
    with pytest.raises(
        UserError, match="q_proj has in_features=64, .* block size 128 .*--ignore .*q_proj.* mapping file"
    ):
        export_checkpoint(nvfp4[0], tmp_path / "packed", scheme={"*.q_proj": scheme})


@pytest.mark.parametrize("scheme", ["NVFP4A16", "INT4_G32", "FP8", "MXFP4A16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_in_every_format(tmp_path, scheme, value):
    model = make_llama(layers=1).bfloat16()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 40] = value
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="0.mlp.up_proj.weight holds NaN or infinity"):
        export_checkpoint(tmp_path / "source", tmp_path / "packed", scheme=scheme)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("scheme", ["NVFP4", "INT4_G32", "MXFP4A16", "MXFP4MXFP8"])
def test_a_tied_head_is_refused_in_every_scheme(nvfp4, tmp_path, scheme):
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        export_checkpoint(nvfp4[0], tmp_path / "packed", scheme=scheme, ignore=())


def test_activations_that_the_file_cannot_hold_are_an_option_of_the_engine_for_all_layers(nvfp4, tmp_path):
    folder = export_checkpoint(nvfp4[0], tmp_path / "packed", scheme="MXFP4MXFP8")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [group["input_activations"] for group in config["config_groups"].values()] == [None]
    options = "--quantization-config.linear.activation mxfp8 --quantization-config.moe.activation mxfp8"
    assert f"vllm serve {folder} {options}\n" in (folder / "README.md").read_text()
    mixed = {"torch.nn.Linear": "MXFP4MXFP8", "*.down_proj": "MXFP4A16"}
    with pytest.raises(UserError, match="down_proj is in MXFP4A16, other layers in MXFP4MXFP8, .*activation mxfp8"):
        export_checkpoint(nvfp4[0], tmp_path / "mixed", scheme=mixed)


@pytest.mark.parametrize("scheme", ["MXFP4A16", "INT4_G32", "FP8", "NVFP4A16", "MXFP4FP8"])
def test_auto_rounds_format_refuses_what_its_backends_do_not_read(nvfp4, tmp_path, scheme):
    with pytest.raises(UserError, match=f"is quantized in {scheme}, for which AutoRound has no .*compressed-tensors"):
        export_checkpoint(nvfp4[0], tmp_path / "packed", "auto_round", scheme=scheme)


# ---- Refusals ----


def damaged(source: Path, folder: Path, damage: str) -> Path:
    """A copy of `source` with one thing wrong."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif damage == "missing tensor":
        save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights, {"format": "pt"})
    elif damage == "wrong shape":
        save_file(tensors | {"model.norm.weight": torch.ones(3)}, weights, {"format": "pt"})
    elif damage == "missing shard":
        weights.unlink()
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "nan":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 40] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "no scheme":
        (folder / "qat_config.json").unlink()
    elif damage == "tied head":
        config = QATConfig.load(folder)
        QATConfig(config.mapping, (), config.scale_rules).save(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no config", "not a Hugging Face checkpoint"),
        ("no weights", "has neither model.safetensors nor"),
        ("truncated", "model.safetensors is truncated or corrupted"),
        ("garbage", "model.safetensors is truncated or corrupted"),
        ("missing tensor", "lacks 1 tensors of LlamaForCausalLM, e.g. model.norm.weight"),
        ("wrong shape", "does not fit the model"),
        ("missing shard", "model-00001-of-00001.safetensors is missing"),
        ("nan", "model.layers.1.mlp.up_proj.weight holds NaN or infinity in 1 blocks"),
        ("no scheme", "give --quant_scheme"),
        ("tied head", "lm_head shares its weight with the embedding"),
    ],
)
def test_a_bad_source_is_named_and_leaves_nothing(source, tmp_path, damage, message):
    bad = damaged(source, tmp_path / "bad", damage)
    before = fingerprint(bad)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(bad, tmp_path / "deep" / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    assert fingerprint(bad) == before


def test_what_is_no_folder_or_packed_already_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        export_checkpoint("nowhere", tmp_path / "packed")
    packed = export_checkpoint(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="already quantized .compressed-tensors."):
        export_checkpoint(packed, tmp_path / "again")
    with pytest.raises(ValueError, match="choose one of auto, compressed-tensors, auto_round"):
        export_checkpoint(source, tmp_path / "again", "gguf")


def test_auto_rounds_format_cannot_hold_rule_even(source, tmp_path):
    even = damaged(source, tmp_path / "even", "")
    QATConfig({"torch.nn.Linear": "MXFP4"}, scale_rules={"MXFP4": {"weight": "search", "input": "even"}}).save(even)
    with pytest.raises(ValueError, match="rule 'even', which AutoRound's format cannot hold"):
        export_checkpoint(even, tmp_path / "packed", "auto_round")
    folder = export_checkpoint(even, tmp_path / "packed")
    assert verify(folder, even, with_logits=False)["verified"]


def test_an_existing_target_is_replaced_only_when_asked_and_a_checkpoint(source, tmp_path):
    target = export_checkpoint(source, tmp_path / "packed")
    (target / "stale").write_text("")
    with pytest.raises(ValueError, match="--overwrite"):
        export_checkpoint(source, target)
    export_checkpoint(source, target, overwrite=True)
    assert not (target / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["packed"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_checkpoint(source, tmp_path / "photos", overwrite=True)
    for target in (source, source.parent):
        with pytest.raises(ValueError, match="would replace the source"):
            export_checkpoint(source, target, overwrite=True)


def test_a_full_disk_leaves_the_old_export_and_nothing_else(source, tmp_path, monkeypatch):
    target = export_checkpoint(source, tmp_path / "packed")
    before = fingerprint(target)

    write, calls = os.pwrite, iter(range(100))

    def pwrite(descriptor, values, offset):
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, values[:100], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="the disk is full, nothing was left"):
        export_checkpoint(source, target, overwrite=True)
    assert fingerprint(target) == before and [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_too_little_disk_is_known_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="needs [0-9,]+ bytes and 1 are free"):
        export_checkpoint(source, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_an_export_killed_at_once_leaves_no_target_and_the_source_as_it_was(source, tmp_path):
    before, target = fingerprint(source), tmp_path / "packed"
    child = os.fork()  # a process of its own, which nobody can ask to clean up
    if child == 0:
        ShardWriter.put = lambda *_: os.kill(os.getpid(), SIGKILL)
        try:
            export_checkpoint(source, target)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == SIGKILL and fingerprint(source) == before
    assert [path.name for path in tmp_path.iterdir()] == [".packed.partial"]
    export_checkpoint(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_a_killed_export_left_is_removed_by_the_next(source, tmp_path, caplog):
    (tmp_path / ".packed.partial").mkdir()
    (tmp_path / ".packed.partial" / "half").write_text("")
    export_checkpoint(source, tmp_path / "packed")
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    assert "left by a process that was killed" in caplog.text
