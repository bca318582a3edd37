"""The proof of equality: it holds for what export writes, and it notices a single changed bit."""

from __future__ import annotations

import json
import shutil
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import MIXED, make_llama, make_tokenizer, save_qat
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from qat import prepare_qat
from qat.checkpoints import logits_proof, verify
from qat.checkpoints import verify_logits as logits
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verdict import recorded_source
from qat.checkpoints.verify import VerificationError
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A source and its packed folder."""
    folder = tmp_path_factory.mktemp("verify")
    source = save_qat(folder / "source", MIXED)
    return source, export_checkpoint(source, source / "packed")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> tuple[Path, Path]:
    """The same with calibrated scales and INT4."""
    folder = tmp_path_factory.mktemp("calibrated")
    source = save_calibrated(folder / "source", TOGETHER)
    return source, export_checkpoint(source, folder / "packed")


@pytest.fixture
def same_process(monkeypatch, tmp_path):
    """Start no process for logits: the same program, called."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, input_ids):
        save_file({"input_ids": input_ids}, "inputs.safetensors")
        logits.main([*arguments, "--inputs", "inputs.safetensors", "--outputs", "outputs.safetensors"])
        return load_file("outputs.safetensors")

    monkeypatch.setattr(logits, "_begin", lambda stack, *given: partial(run, *given))


def test_a_packed_model_equals_the_fake_quantized_one_and_the_verdict_says_by_how_much(pair, same_process):
    """In fresh processes: test_launch.py."""
    source, packed = pair
    verdict = verify.verify(packed, source, tokens=48)
    assert verdict["verified"] and verdict == json.loads((packed / "verification.json").read_text())
    left = verdict["left_unquantized"]
    assert verdict["quantized_share"] == 1.0 and "(ignored by 'lm_head'), e.g. lm_head" in left[0]
    weights, compared = verdict["weights"], verdict["logits"]
    assert weights["packed_weights"] == 14
    assert weights["elements_compared"] == 2 * 64 * (3 * 96 + 2 * 64 + 2 * 32)
    assert (weights["elements_that_differ"], weights["bytes_over_nominal"]) == (0, 1.0)
    assert compared["bit_equal"] and compared["tokens"] == 48
    assert compared["engine_activation_rules"] == {"MXFP4": "even", "MXFP8": "even"}
    assert compared["mean_log_probability_difference_to_trained_rule"] > 0  # EVEN is not FLOOR, and the verdict says so


@pytest.mark.parametrize(
    ("mapping", "export_format", "kwargs"),
    [
        ({"torch.nn.Linear": "MXFP4"}, "auto_round", {"tie_word_embeddings": False}),
        ({"torch.nn.Linear": "MXFP8_RCEIL"}, "auto_round", {}),
        (MIXED, "auto_round", {"attention_bias": True}),
        ({"torch.nn.Linear": "MXFP8"}, "compressed-tensors", {"tie_word_embeddings": False, "attention_bias": True}),
    ],
)
def test_logits_are_bit_equal_in_both_formats(tmp_path, monkeypatch, same_process, mapping, export_format, kwargs):
    monkeypatch.chdir(tmp_path)
    source = save_qat(tmp_path / "source", mapping, **kwargs)
    compared = verify.verify(export_checkpoint(source, tmp_path / "packed", export_format), source, 32)["logits"]
    assert compared["bit_equal"]
    if export_format == "auto_round":  # its engine applies the rule of the training
        assert compared["mean_log_probability_difference_to_trained_rule"] == 0


def save_calibrated(folder: Path, mapping: dict[str, str]) -> Path:
    """A QAT checkpoint, with calibrated scales where its schemes need them."""
    model = prepare_qat(make_llama(layers=1, attention_bias=True).bfloat16(), mapping)
    calibrate_inputs(model, [{"input_ids": torch.arange(256)[None]}])
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder


WEIGHT_ONLY = ("MXFP4A16", "MXFP8A16", "NVFP4A16", "INT4_G32")
TOGETHER = {"torch.nn.Linear": "NVFP4", "*.o_proj": "INT4_G32", "*.mlp.*": "MXFP4FP8", "*.down_proj": "FP8"}
LOGITS = [*({"torch.nn.Linear": name} for name in (*WEIGHT_ONLY, "NVFP4", "FP8", "MXFP4FP8")), TOGETHER]


@pytest.mark.parametrize("mapping", LOGITS, ids=lambda mapping: "-".join(mapping.values()))
def test_logits_of_each_scheme_are_bit_equal_to_those_of_transformers(tmp_path, same_process, mapping):
    source = save_calibrated(tmp_path / "source", mapping)
    verdict = verify.verify(export_checkpoint(source, tmp_path / "packed"), source, 32)
    compared = verdict["logits"]
    assert verdict["verified"] and compared["bit_equal"] and compared["why_not_bit_equal"] is None
    is_plain = set(mapping.values()) <= set(WEIGHT_ONLY)
    assert (compared["mean_log_probability_difference_to_trained_rule"] == 0) == is_plain


def test_the_verdict_says_that_the_engine_leaves_activations_alone_which_the_file_cannot_hold(
    tmp_path, same_process, caplog
):
    source = save_calibrated(tmp_path / "source", {"torch.nn.Linear": "MXFP4MXFP8"})
    compared = verify.verify(export_checkpoint(source, tmp_path / "packed"), source, 32)["logits"]
    assert compared["bit_equal"] and compared["activations_not_quantized_by_engine"] == ["MXFP4MXFP8"]
    assert compared["engine_activation_rules"] == {"MXFP4MXFP8": None}
    assert compared["trained_activation_rules"] == {"MXFP4MXFP8": "floor"}
    assert compared["mean_log_probability_difference_to_trained_rule"] > 0
    assert "leaves the activations of MXFP4MXFP8 unquantized" in caplog.text


def test_the_verdict_has_the_reason_where_a_library_computes_in_another_way(tmp_path, same_process, caplog):
    caplog.set_level("INFO", "qat")
    source = save_calibrated(tmp_path / "source", {"torch.nn.Linear": "NVFP4"})
    verdict = verify.verify(export_checkpoint(source, tmp_path / "packed", "auto_round"), source, 32)
    assert verdict["verified"] and not verdict["logits"]["bit_equal"]
    assert 0 < verdict["logits"]["largest_difference"] < 0.1
    assert "reciprocals" in verdict["logits"]["why_not_bit_equal"]
    assert "logits are not proven and differ by up to" in caplog.text and "NVFP4: AutoRound's" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("q_proj.input_global_scale", "1 elements differ, first in model.layers.0.self_attn.q_proj.input_global_scale"),
        ("q_proj.weight_global_scale", r"\d+ elements differ, first in .*0.self_attn.q_proj.weight_global_scale"),
        ("k_proj.weight_scale", r"\d+ elements differ, first in model.layers.0.self_attn.k_proj.weight"),
        ("o_proj.weight_packed", "1 elements differ, first in model.layers.0.self_attn.o_proj.weight"),
        ("o_proj.weight_shape", "1 elements differ, first in model.layers.0.self_attn.o_proj.weight_shape"),
    ],
)
def test_one_changed_bit_of_any_kind_of_tensor_is_found(calibrated, tmp_path, tensor, said):
    source, packed = calibrated
    changed = Path(shutil.copytree(packed, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[f"model.layers.0.self_attn.{tensor}"].view(torch.uint8).flatten()[0] ^= 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=said):
        verify.verify(changed, source, with_logits=False)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight_packed", "1 elements differ, first in model.layers.1.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.k_proj.weight_scale", r"\d+ elements differ, first in .*0.self_attn.k_proj.weight"),
        ("model.norm.weight", "1 elements differ, first in model.norm.weight"),
    ],
)
def test_one_changed_bit_is_found_and_named(pair, tmp_path, tensor, said):
    source, packed = pair
    changed = Path(shutil.copytree(packed, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[tensor].view(torch.uint8).flatten()[0] ^= 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=said):
        verify.verify(changed, source, with_logits=False)
    assert json.loads((changed / "verification.json").read_text())["verified"] is False


def test_missing_and_surplus_tensors_are_found(pair, tmp_path):
    source, packed = pair
    changed = Path(shutil.copytree(packed, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["surplus"] = tensors.pop("model.layers.0.mlp.gate_proj.weight_scale")
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        VerificationError,
        match=r"is not the model in /.*: 2 elements differ, first in .*gate_proj.weight_scale \(missing\)",
    ):
        verify.verify(changed, source, with_logits=False)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.safetensors", lambda content: content[:-10], "is truncated or corrupted"),
        ("model.safetensors", lambda content: content + b"more", "is truncated or corrupted"),
        ("config.json", lambda content: content[:40], "config.json"),
        ("config.json", lambda content: content.replace(b'"quant_method"', b'"method"'), "is not a packed checkpoint"),
    ],
)
def test_a_folder_that_was_damaged_after_its_proof_loses_its_verdict(pair, tmp_path, name, change, said):
    source, packed = pair
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    assert verify.verify(copy, source, with_logits=False)["verified"]
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(UserError, match=said):
        verify.verify(copy, source, with_logits=False)
    left = json.loads((copy / "verification.json").read_text())
    assert left["verified"] is False and recorded_source(copy) == source.resolve()


def test_a_folder_that_transformers_cannot_load_is_one_line_and_is_not_verified(tmp_path, monkeypatch):
    def begin(process, arguments):
        process.errors, process.found = tmp_path / "errors.txt", 0
        try:
            logits.main(arguments)
        except UserError:
            process.found = process.errors.write_text(traceback.format_exc())

    monkeypatch.setattr(logits._Process, "__init__", lambda process, stack: setattr(process, "folder", tmp_path))
    monkeypatch.setattr(logits._Process, "begin", begin)
    monkeypatch.setattr(logits._Process, "status", lambda process: process.found)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 260}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts)).bfloat16().save_pretrained(tmp_path / "source")
    packed = export_checkpoint(tmp_path / "source", tmp_path / "packed", scheme="MXFP4", ignore=("*.experts",))
    (packed / "verification.json").write_text('{"verified": true}')  # of an earlier export
    monkeypatch.setattr(verify, "why_not_loadable", lambda *_: None)  # a cause that is not known
    said = "packed is not proven.*cannot load it: .*experts.gate_up_proj"
    with pytest.raises(VerificationError, match=said) as error:
        verify.verify(packed, tmp_path / "source", tokens=8)
    assert "\n" not in str(error.value)
    assert json.loads((packed / "verification.json").read_text())["verified"] is False


def test_wrong_logits_are_an_error_though_all_weights_agree(pair, monkeypatch, tmp_path):
    source, packed = pair
    changed = Path(shutil.copytree(packed, tmp_path / "changed"))
    served, expected = torch.zeros(1, 8, 260), torch.zeros(1, 8, 260)
    served[0, 3, 5] = 2.0**-20
    monkeypatch.setattr(logits_proof, "begin_packed", lambda *_: lambda: served)
    monkeypatch.setattr(
        logits_proof, "begin_fake_quantized", lambda *_: lambda: logits.Expected(expected, expected, False)
    )
    with pytest.raises(VerificationError, match="all weights are equal, but the logits of transformers"):
        verify.verify(changed, source, tokens=8)


def test_the_source_is_found_again_or_asked_for(pair, tmp_path):
    source, packed = pair
    verify.verify(packed, source, with_logits=False)
    assert verify.verify(packed, with_logits=False)["source"] == ".."
    lonely = Path(shutil.copytree(packed, tmp_path / "lonely"))
    with pytest.raises(ValueError, match="give --source"):
        verify.verify(lonely, with_logits=False)
    with pytest.raises(ValueError, match="is not a packed checkpoint"):
        verify.verify(source, source, with_logits=False)
