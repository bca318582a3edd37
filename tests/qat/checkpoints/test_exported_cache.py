"""A quantized key/value cache in packed folders: its settings, its scales, the proof, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_families import logits_in_this_process
from torch import nn

from qat import prepare_qat
from qat.checkpoints.dialects import get_dialect
from qat.checkpoints.dialects.compressed_tensors import kv_cache_args
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.checkpoints.verify_logits import VerificationError
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs, calibrated_scales, set_calibrated_scales
from qat.schemes.presets import get_kv_cache_scheme

same_process = pytest.fixture(logits_in_this_process)


def save_trained(folder, is_calibrated=True):
    """A checkpoint that was trained with a quantized cache; scales so coarse that each logit shows them."""
    model = prepare_qat(make_llama(layers=1).bfloat16(), {nn.Linear: "MXFP8A16"}, kv_cache_scheme="FP8")
    if is_calibrated:
        calibrate_inputs(model, [{"input_ids": torch.arange(200)[None]}])
        set_calibrated_scales(model, {name: 8 * value for name, value in calibrated_scales(model).items()})
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder, model


def test_the_settings_are_those_that_compressed_tensors_reads():
    from compressed_tensors.quantization import QuantizationArgs

    _, spec = get_kv_cache_scheme("fp8")
    args = QuantizationArgs(**kv_cache_args(spec.format))
    found = args.num_bits, args.type, args.strategy, args.symmetric, args.dynamic
    assert found == (8, "float", "tensor", True, False)


def test_a_folder_holds_the_scales_and_is_proven_with_the_cache_quantized(tmp_path, same_process):
    source, model = save_trained(tmp_path / "trained")
    folder = export_checkpoint(source, tmp_path / "packed")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["strategy"] == "tensor"
    tensors = load_file(folder / "model.safetensors")
    scales = {name: t for name, t in tensors.items() if name.endswith((".k_scale", ".v_scale"))}
    assert {name: float(scale) for name, scale in scales.items()} == calibrated_scales(model)
    assert {(scale.dtype, scale.shape) for scale in scales.values()} == {(torch.float32, (1,))}
    logits = verify(folder, source)["logits"]
    assert logits["bit_equal"] and logits["mean_log_probability_difference_to_trained_rule"] > 0
    assert logits["key_value_cache"] == {
        "scheme": "FP8", "engine_rule": "absmax_native", "trained_rule": "absmax"
    }  # fmt: skip
    name = "model.layers.0.self_attn.k_scale"
    save_file({**tensors, name: tensors[name] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=name):
        verify(folder, source, with_logits=False)


def test_an_uncalibrated_cache_is_not_exported(tmp_path):
    source, _ = save_trained(tmp_path / "trained", is_calibrated=False)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k_scale is not calibrated"):
        export_checkpoint(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_auto_round_s_format_cannot_hold_it():
    model = prepare_qat(make_llama(layers=1), {nn.Linear: "MXFP4"}, kv_cache_scheme="FP8")
    with pytest.raises(UserError, match="--export_format auto_round: the key/value cache is quantized"):
        check_exportable(model, "auto_round")
    check_exportable(model, "compressed-tensors")


def test_without_a_scheme_of_the_cache_the_settings_say_so():
    assert get_dialect("compressed-tensors").config({"l": prepared_scheme()}, [])["kv_cache_scheme"] is None


def prepared_scheme():
    return prepare_qat(make_llama(layers=1), {nn.Linear: "MXFP4"}).model.layers[0].mlp.up_proj.scheme
