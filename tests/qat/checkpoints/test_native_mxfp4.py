"""gpt-oss's native format: bytes, reading and refusals; runs from one folder to the next are in test_gpt_oss.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from gpt_oss_folders import NATIVE, make_gpt_oss, save_gpt_oss, save_published, values_of
from helpers import make_llama, save_llama
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qat import prepare_qat
from qat.checkpoints.dialects import AUTO, DIALECTS, get_dialect, resolved_format
from qat.checkpoints.engine_facts import NATIVE_ENGINES, NATIVE_SOURCES, SOURCES
from qat.checkpoints.engines import engine_table
from qat.checkpoints.exportable import check_exportable
from qat.checkpoints.load import load_plain
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.packed_folder import check_packed, check_packed_values
from qat.checkpoints.unpack import load_packed
from qat.checkpoints.verify import VerificationError, verify
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import quantized_sites
from qat.numerics import ops
from qat.schemes.presets import get_scheme

NAME = "model.layers.1.mlp.experts.gate_up_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return save_published(tmp_path_factory.mktemp("native") / "published")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_gpt_oss(tmp_path_factory.mktemp("native") / "source")


@pytest.mark.parametrize("read", [load_plain, lambda folder: load_packed(folder)[0]])
def test_published_experts_are_read_exactly_as_transformers_lays_them_out(published, read, caplog):
    state, expected = read(published).state_dict(), values_of(published)
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not [record for record in caplog.records if record.name.startswith("transformers.quantizers")]


def test_all_scales_and_codes_are_read_as_transformers_reads_them(published, tmp_path):
    """Under each scale of E8M0 but NaN; from 2^126 on some codes are beyond BF16, in both."""
    tensors = load_file(published / WEIGHTS)
    scales = torch.arange(4 * 192 * 2).reshape(4, 192, 2).remainder(253).to(torch.uint8)
    tensors[f"{NAME}_scales"] = scales
    folder = copy_of(published, tmp_path, tensors)
    found = load_packed(folder)[0].get_parameter(NAME)
    assert torch.equal(found, convert_moe_packed_tensors(tensors[f"{NAME}_blocks"], scales))


def test_a_stage_that_rounds_published_experts_again_changes_nothing(published):
    model, config = load_packed(published)
    assert config.mapping == {"torch.nn.Linear": "MXFP4A16"} and "model.layers.0.self_attn.q_proj" in config.ignore
    sites, expected = quantized_sites(prepare_as_saved(model, config)), values_of(published)
    assert [site.label for site in sites[2:]] == [NAME, "model.layers.1.mlp.experts.down_proj"]
    for site in sites:
        rounded = site.module.weight_quantizer.rounding.values(site.weight.transpose(1, 2).contiguous(), torch.bfloat16)
        assert torch.equal(rounded.transpose(1, 2), expected[site.tensor])


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16", "MXFP4MXFP8"])
def test_what_is_exported_is_what_transformers_dequantizes_and_the_weights_are_proven(source, tmp_path, scheme):
    packed = export_checkpoint(source, tmp_path / "packed", scheme=scheme)
    assert verify(packed, source, with_logits=False)["weights"]["packed_weights"] == 4
    assert json.loads((packed / "config.json").read_text())["quantization_config"] == NATIVE
    plain, held = load_file(source / WEIGHTS), values_of(packed)
    assert set(plain) == set(held)
    for name, tensor in plain.items():
        if name.endswith("_proj"):
            rows = tensor.transpose(1, 2).contiguous()
            tensor = ops.fake_quantize(rows, "mxfp4", get_scheme(scheme).weight.rule, torch.bfloat16).transpose(1, 2)
        assert torch.equal(held[name], tensor), name
    loaded, config = load_packed(packed)
    assert config.mapping == {"*.experts": scheme}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in held.items())
    assert load_plain(packed).get_parameter(NAME).equal(held[NAME])


def test_a_changed_byte_of_a_block_or_a_scale_is_found(source, tmp_path):
    packed = export_checkpoint(source, tmp_path / "packed", scheme="MXFP4A16")
    tensors = load_file(packed / WEIGHTS)
    for part in ("_blocks", "_scales"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[NAME + part].view(-1)[5] ^= 1
        save_file(changed, packed / WEIGHTS, {"format": "pt"})
        with pytest.raises(VerificationError, match=f"elements differ, first in {NAME}"):
            verify(packed, source, with_logits=False)


def copy_of(published: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The published folder with other tensors."""
    for path in published.iterdir():
        if path.name != WEIGHTS:
            os.link(path, folder / path.name)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("read", [check_packed_values, load_plain])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}_scales": None}, rf"{NAME}_scales is missing|gate_up_proj"),
        ({f"{NAME}_blocks": torch.zeros(4, 192, 2, 8, dtype=torch.uint8)}, r"must be U8 \(E, N, K / 32, 16\)|gate_up"),
        ({f"{NAME}_scales": torch.full((4, 192, 2), 255, dtype=torch.uint8)}, "NaN or inf"),
    ],
)
def test_folders_that_are_incomplete_or_broken_are_refused_by_name(published, tmp_path, read, change, message):
    tensors = {name: tensor for name, tensor in (load_file(published / WEIGHTS) | change).items() if tensor is not None}
    folder = copy_of(published, tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_native_folder_without_a_packed_tensor_or_of_another_model_is_refused(published, tmp_path):
    tensors = values_of(published)
    with pytest.raises(ValueError, match="has the quant_method mxfp4, but no packed tensor"):
        check_packed(copy_of(published, tmp_path, tensors))
    llama = save_llama(tmp_path / "llama", layers=1)
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": NATIVE}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized by mxfp4, which is not read"):
        load_plain(llama)


def test_auto_is_the_native_format_for_gpt_oss_and_compressed_tensors_for_others():
    assert (resolved_format(AUTO, "gpt_oss"), resolved_format(AUTO, "llama")) == ("mxfp4", "compressed-tensors")
    assert resolved_format("compressed-tensors", "gpt_oss") == "compressed-tensors"
    with pytest.raises(ValueError, match="native one of gpt_oss, and the model is a llama; use compressed-tensors"):
        resolved_format("mxfp4", "llama")
    with pytest.raises(ValueError, match="unknown; choose one of auto, compressed-tensors, auto_round, mxfp4"):
        get_dialect("mxfp5")
    assert DIALECTS["mxfp4"].packs_fused


@pytest.mark.parametrize(
    ("mapping", "kwargs", "message"),
    [
        ({"torch.nn.Linear": "MXFP4"}, {}, r"self_attn.q_proj is quantized in MXFP4, .*map '\*.experts' alone, or use"),
        ({"*.experts": "MXFP8"}, {}, "experts.gate_up_proj has weights in mxfp8, .* use a scheme such as MXFP4A16"),
        ({"*.0.mlp.experts": "MXFP4"}, {}, r"layers\[.\]1.*experts.* are left alone, .* holds those of all layers"),
        ({"*.experts": "MXFP4"}, {"kv_cache_scheme": "FP8"}, "the key/value cache is quantized"),
    ],
)
def test_what_the_native_format_cannot_hold_is_refused_with_the_remedy(mapping, kwargs, message):
    model = prepare_qat(make_gpt_oss(), mapping, **kwargs)
    with pytest.raises(ValueError, match=f"--export_format auto: .*{message}.*compressed-tensors"):
        check_exportable(model, AUTO)


def test_a_published_folder_is_not_exported_again_and_has_no_checkpoint_in_bf16_to_name(published, tmp_path):
    with pytest.raises(ValueError, match="already quantized .mxfp4.; engines serve it as it is, and main.py trains it"):
        export_checkpoint(published, tmp_path / "packed", scheme="MXFP4")


def test_the_native_format_is_refused_for_other_models():
    with pytest.raises(ValueError, match="--export_format mxfp4: .* the model is a llama"):
        check_exportable(prepare_qat(make_llama(), {"torch.nn.Linear": "MXFP4"}), "mxfp4")


def test_the_table_of_engines_is_about_the_native_format():
    table = engine_table([get_scheme("MXFP4")], "mxfp4")
    rows = [line.strip() for line in table.splitlines() if line.startswith("  ")]
    assert [row.split("  ")[0] for row in rows] == ["vLLM on GPUs", "vLLM on CPUs", "transformers, mxfp4"]
    assert "Different: transformers, mxfp4 (not quantized)" in table
    facts = [fact for engine in NATIVE_ENGINES for fact in engine.facts.values()]
    assert {fact.source for fact in facts} <= {*SOURCES, *NATIVE_SOURCES}
