"""PTQ in: packed checkpoints load exactly, and QAT starts from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import MIXED, make_llama, make_tokenizer, save_llama, save_qat, write_conversations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import main
from qat import prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import is_packed, load_packed
from qat.layers.quant_linear import is_quantlinear
from qat.layers.restore import prepare_as_saved
from qat.numerics import ops
from qat.numerics.formats import Quantized
from training.resume import output

IDS = torch.arange(0, 128)[None]


@pytest.mark.parametrize("export_format", ["compressed-tensors", "auto_round"])
@pytest.mark.parametrize("mapping", [{"torch.nn.Linear": "MXFP4"}, {"torch.nn.Linear": "MXFP8_RCEIL"}, MIXED])
def test_the_first_forward_equals_the_quantized_model_bit_for_bit(tmp_path, caplog, mapping, export_format):
    source = save_qat(tmp_path / "source", mapping)
    packed = export_checkpoint(source, tmp_path / "packed", export_format)
    before = prepare_qat(AutoModelForCausalLM.from_pretrained(source), mapping)
    after, config = load_packed(packed)
    for name, layer in before.named_modules():
        if is_quantlinear(layer):
            assert torch.equal(after.get_submodule(name).weight, layer.weight_quantizer(layer.weight)), name
    prepare_as_saved(after, config)
    assert torch.equal(after(IDS).logits, before(IDS).logits)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert "rounded again" not in caplog.text


def test_without_our_own_config_the_scheme_is_read_off_the_checkpoint(tmp_path):
    for scheme, export_format in (("MXFP4_RCEIL", "auto_round"), ("MXFP8", "compressed-tensors")):
        source = save_llama(tmp_path / scheme / "source", tie_word_embeddings=False)
        ignore = ("lm_head", "0.mlp.up_proj")
        packed = export_checkpoint(source, tmp_path / scheme / "packed", export_format, scheme, ignore)
        (packed / "qat_config.json").unlink()
        config = load_packed(packed)[1]
        assert config.mapping == {"torch.nn.Linear": scheme}
        assert config.ignore == ("model.layers.0.mlp.up_proj", "lm_head")


def test_a_mixed_checkpoint_without_our_config_names_its_exceptions(tmp_path):
    packed = export_checkpoint(save_qat(tmp_path / "source", MIXED), tmp_path / "packed")
    (packed / "qat_config.json").unlink()
    assert load_packed(packed)[1].mapping == {
        "torch.nn.Linear": "MXFP4",
        "model.layers.0.mlp.down_proj": "MXFP8",
        "model.layers.1.mlp.down_proj": "MXFP8",
    }


def test_what_auto_round_packs_itself_loads_and_prepares(tmp_path):
    """AutoRound's own layers write the checkpoint here: its packing and its tensor names, nothing of ours."""
    from auto_round.data_type.mxfp import quant_mx
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear

    model, tensors, expected = make_llama(layers=1).bfloat16(), {}, {}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        values, exponent, _ = quant_mx(module.weight.data.clone(), bits=4, group_size=32)
        rows, columns = values.shape
        expected[f"{name}.weight"] = values
        module.weight.data = values
        packed = QuantLinear(4, 32, columns, rows, False, data_type="mx_fp", act_bits=4)
        packed.pack(module, exponent.reshape(rows, -1), device="cpu")
        tensors |= {f"{name}.weight_packed": packed.weight_packed, f"{name}.weight_scale": packed.weight_scale}
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    plain = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k not in expected}
    save_file(tensors | plain, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "bits": 4, "act_bits": 4,
        "data_type": "mx_fp", "act_data_type": "mx_fp", "group_size": 32, "sym": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded, config = load_packed(tmp_path)
    assert all(torch.equal(loaded.get_parameter(name), values) for name, values in expected.items())
    assert config.mapping == {"torch.nn.Linear": "MXFP4"}


def test_rounding_again_is_announced_where_it_changes_something(tmp_path, caplog):
    source = save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP8"})
    config = json.loads((source / "qat_config.json").read_text())
    config["scale_rules"]["MXFP8"]["weight"] = "even"
    (source / "qat_config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    # 1.74 rounds to 1.75, from which EVEN doubles the scale; 3 of the smallest steps are then 1.5 of them.
    tensors["model.layers.0.mlp.up_proj.weight"][0, :2] = torch.tensor([1.74, 3 * 2**-17])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    packed = export_checkpoint(source, tmp_path / "packed")
    assert load_packed(packed)[1].scale_rules["MXFP8"]["weight"] == "even"
    assert "2 of 61440 packed elements in 1 of 14 layers (0.003 %) change when rounded again in mxfp8" in caplog.text
    assert "under even, the rule of the folder, by 0.000206 %" in caplog.text
    assert "--weight_scale_rule rceil keeps them" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_any_packed_weight_keeps_its_values_when_rceil_rounds_it_again(bits):
    codes = torch.randint(0, 256, (512, 32 * bits // 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x77  # E4M3's NaN becomes 240; E2M1 has none
    scale = torch.randint(60, 190, (512, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    values = ops.dequantize(Quantized(codes, (scale,)), f"mxfp{bits}", torch.bfloat16)
    assert torch.equal(ops.fake_quantize(values, f"mxfp{bits}", "rceil", torch.bfloat16), values)


def test_a_foreign_checkpoint_that_floor_would_change_is_rounded_under_rceil(tmp_path, caplog):
    packed = export_checkpoint(save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP8"}), tmp_path / "packed")
    (packed / "qat_config.json").unlink()
    tensors = load_file(packed / "model.safetensors")
    block = tensors["model.layers.0.mlp.up_proj.weight"][0, :32]
    block.copy_(torch.full((32,), 240.0).to(block.dtype))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    model, config = load_packed(packed)
    assert config.scale_rules == {"MXFP8": {"weight": "rceil", "input": "floor"}}
    assert "32 of 61440 packed elements" in caplog.text
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(ops.fake_quantize(weight, "mxfp8", "rceil", torch.bfloat16), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks 1 tensors of LlamaForCausalLM, e.g. model.norm.weight"),
        ({"model.layers.0.mlp.up_proj.weight_scale": None}, "is incomplete: .*up_proj.weight_packed"),
        ({"model.layers.0.mlp.up_proj.weight_scale": torch.zeros(96, 4, dtype=torch.uint8)}, r"must be \(96, 2\)"),
        (
            {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(96, 64)},
            "no layout of MXFP4, MXFP8, NVFP4, INT4 or FP8",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight_global_scale": torch.ones(1)},
            "holds packed weights .*weight_global_scale",
        ),
        ({"model.layers.0.mlp.up_proj.weight_zero_point": torch.ones(1)}, r"zero points \(asymmetric quantization\)"),
        ({"surplus": torch.ones(1)}, "1 tensors that LlamaForCausalLM has no place for, e.g. surplus"),
    ],
)
def test_a_damaged_packed_checkpoint_is_refused(tmp_path, change, message):
    packed = export_checkpoint(save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP4"}), tmp_path / "packed")
    tensors = {k: v for k, v in (load_file(packed / "model.safetensors") | change).items() if v is not None}
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_packed(packed)


def run_main(model: Path, output: Path, *flags: str) -> dict:
    data = write_conversations(output.parent / "data.jsonl", 12)
    main.main(
        ["--model_name_or_path", str(model), "--dataset", str(data), "--eval_size", "4", "--output_dir", str(output),
         "--report_to", "none", "--report", "False", "--disable_tqdm", "True",
         "--per_device_train_batch_size", "4", *flags]
    )  # fmt: skip
    return json.loads((output / "all_results.json").read_text())


def test_main_evaluates_a_packed_folder_as_the_trained_one_and_trains_on_from_it(tmp_path):
    source = save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP4"})
    packed = export_checkpoint(source, tmp_path / "packed")
    trained = run_main(source, tmp_path / "a", "--do_eval", "True")
    served = run_main(packed, tmp_path / "b", "--do_eval", "True")
    assert served["eval_loss"] == trained["eval_loss"]
    train = ("--do_train", "True", "--max_steps", "1", "--save_strategy", "no", "--export_format", "none")
    run_main(packed, tmp_path / "c", *train)
    assert not is_packed(tmp_path / "c") and is_packed(packed)
    assert json.loads((tmp_path / "c" / "qat_config.json").read_text())["mapping"] == {"torch.nn.Linear": "MXFP4"}


def test_main_packs_what_it_trained_and_says_how_to_serve_it(tmp_path, monkeypatch, caplog):
    verified = []
    monkeypatch.setattr(output, "verify", lambda *folders, **_: verified.append(folders))
    source = save_llama(tmp_path / "source", layers=1)
    shutil.copytree(source, tmp_path / "copy")
    run_main(source, tmp_path / "out", "--quant_scheme", "MXFP8", "--do_train", "True", "--max_steps", "1")
    assert verified == [(tmp_path / "out" / "MXFP8", tmp_path / "out")]
    assert is_packed(tmp_path / "out" / "MXFP8") and f"vllm serve {tmp_path / 'out' / 'MXFP8'}" in caplog.text


def test_other_quantized_checkpoints_are_refused(tmp_path):
    source = save_llama(tmp_path / "source", layers=1)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no packed tensor"):
        load_packed(source)
