"""What engines compute for a packed folder: one data file, the docs made from it, and the table after an export."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT, save_llama, save_qat
from tiny_families import save_family

from qat.checkpoints.dialects import DIALECTS
from qat.checkpoints.engine_facts import AS_TRAINED, CHOSEN, ENGINES, OPEN, SOURCES
from qat.checkpoints.engines import engine_table, kind_of, markdown, table_of_folder
from qat.checkpoints.in_transformers import VERDICT_NAME, in_transformers
from qat.checkpoints.pack import export_checkpoint
from qat.errors import UserError
from qat.numerics.families import formats
from qat.schemes.presets import PRESETS, get_scheme

CT = "compressed-tensors"
CT_ENGINE = "transformers, compressed-tensors"
MXFP8_OPTION = " ".join(DIALECTS[CT].serve_options([PRESETS["MXFP4MXFP8"]]))


def row_of(table: str, engine: str) -> str:
    (row,) = [line.strip() for line in table.splitlines() if re.match(rf"  {re.escape(engine)}  ", line)]
    return re.sub(r"  +", " | ", row)


def test_the_docs_have_the_table_of_the_data_file():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert markdown() in page, "python -m qat.checkpoints.engines prints what docs/serving.md is to have"
    assert MXFP8_OPTION in page


def test_every_fact_is_about_a_scheme_that_exists_and_has_a_source_and_a_rule_of_its_format():
    kinds = {kind_of(scheme) for scheme in PRESETS.values()}
    for engine in ENGINES:
        assert engine.dialect in (None, *DIALECTS) and set(engine.facts) | set(engine.experts) <= kinds
        for fact in (*engine.facts.values(), *engine.experts.values(), *filter(None, [engine.kv_cache])):
            assert fact.source in SOURCES
            if fact.rule not in (None, AS_TRAINED, CHOSEN):
                assert fact.rule in formats()[fact.inputs].input_rules
            assert fact.inputs in (None, OPEN) or (formats()[fact.inputs].input_rules and fact.serves)


@pytest.mark.parametrize("scheme", [name for name, scheme in PRESETS.items() if scheme.input is not None])
def test_transformers_applies_the_rule_that_the_dialect_says(scheme):
    facts = next(engine.facts for engine in ENGINES if engine.name == "transformers, compressed-tensors")
    fact, rule = facts[kind_of(PRESETS[scheme])], DIALECTS[CT].input_rule(PRESETS[scheme])
    assert (fact.inputs, fact.rule) == (None if rule is None else PRESETS[scheme].input.format.name, rule)


def test_an_engine_that_computes_something_else_than_was_trained_is_named():
    table = engine_table([get_scheme("MXFP4", input_scale_rule="rceil")], CT)
    assert row_of(table, "vLLM on Blackwell").startswith("vLLM on Blackwell | W4A4, RCEIL |")
    assert "W4A16, weights only" in row_of(table, "vLLM on Hopper") and "refused" in row_of(table, "vLLM on CPUs")
    (line,) = [line for line in table.splitlines() if line.startswith("MXFP4 stands for")]
    assert "activations in mxfp4 under RCEIL. Different:" in line
    assert "vLLM on Hopper (not quantized)" in line and "transformers, compressed-tensors (EVEN)" in line
    assert "Blackwell" not in line and "CPU" not in line  # the first applies RCEIL, the second refuses


def test_an_engine_that_quantizes_what_was_trained_in_16_bits_is_named():
    table = engine_table([get_scheme("MXFP4A16")], CT)
    assert "MXFP4A16 stands for unquantized activations. Different: vLLM on Blackwell (mxfp4 under RCEIL)" in table
    assert "was trained" not in engine_table([get_scheme("INT4_G32")], CT)


def test_mxfp4_with_mxfp8_activations_needs_an_option_of_the_engine():
    assert f"vllm serve DIR {MXFP8_OPTION}" in engine_table([get_scheme("MXFP4MXFP8")], CT)
    assert MXFP8_OPTION not in engine_table([get_scheme("MXFP4FP8")], CT)
    of_experts = engine_table([get_scheme("MXFP8")], CT, experts=[get_scheme("MXFP4MXFP8")])
    assert "--quantization-config.moe.activation mxfp8" in of_experts


def test_a_table_of_two_schemes_and_a_cache_names_each():
    table = engine_table([get_scheme("MXFP4"), get_scheme("MXFP8"), get_scheme("MXFP4")], CT, kv_cache=True)
    row = row_of(table, "vLLM on Blackwell")
    assert "MXFP4: W4A4, RCEIL; MXFP8: W8A8, RCEIL; key/value cache: FP8, scales of the file" in row
    assert "key/value cache: not known" in row_of(table, "vLLM on Ampere")


def test_experts_have_a_row_of_their_own_where_a_folder_has_packed_ones(tmp_path):
    source = save_family("mixtral", tmp_path / "source")
    mapping = {"torch.nn.Linear": "MXFP8", "*.experts": "MXFP4"}
    table = table_of_folder(export_checkpoint(source, tmp_path / "packed", scheme=mapping))
    row = row_of(table, "transformers, compressed-tensors")
    assert "MXFP8: W8A8, EVEN; experts in MXFP4: W4A16, weights only" in row and "; MXFP4:" not in row
    assert "experts in transformers, compressed-tensors (not quantized)" in table
    plain = export_checkpoint(source, tmp_path / "plain", scheme="MXFP4", ignore=("*.experts", "lm_head"))
    table = table_of_folder(plain)
    assert "experts in" not in table
    row = row_of(table, "transformers, compressed-tensors")
    assert "cannot load the folder: transformers' CompressedTensorsDequantize drops" in row and "W4A4" not in row


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_experts_that_transformers_makes_linear_layers_of_have_the_facts_of_linear_layers(tmp_path, scheme):
    source = save_family("llama4_text", tmp_path / "source")
    row = row_of(table_of_folder(export_checkpoint(source, tmp_path / "p", scheme=scheme)), CT_ENGINE)
    of_layers = "W4A4, EVEN" if scheme == "MXFP4" else "W8A8, EVEN"
    assert f"{scheme}: {of_layers}; experts in {scheme}: {of_layers}" in row


@pytest.mark.parametrize("family", ["mamba2", "granitemoe"])
def test_a_folder_that_transformers_cannot_load_is_not_said_to_be_computed_there(tmp_path, family):
    packed = export_checkpoint(save_family(family, tmp_path / "source"), tmp_path / "p", scheme="MXFP4")
    row = row_of(table_of_folder(packed), CT_ENGINE)
    assert "cannot load the folder: " in row and in_transformers(packed).why_not in row
    (packed / VERDICT_NAME).write_text('{"logits": {"bit_equal": true}}')  # it was loaded after all
    assert "cannot load" not in table_of_folder(packed)


def test_the_table_of_a_folder_knows_its_schemes_rules_and_format(tmp_path):
    packed = export_checkpoint(
        save_qat(tmp_path / "qat", {"torch.nn.Linear": "MXFP4_RCEIL"}), tmp_path / "p", "auto_round"
    )
    table = table_of_folder(packed)
    assert row_of(table, "transformers, auto_round").startswith("transformers, auto_round | W4A4, as trained")
    assert "transformers, compressed-tensors" not in table and "under RCEIL. Different: vLLM on Hopper" in table
    with pytest.raises(UserError, match="not a packed checkpoint"):
        table_of_folder(save_llama(tmp_path / "plain"))


@pytest.mark.parametrize("mapping", [{"*.v_proj": "MXFP8"}, None], ids=["another scheme", "unquantized"])
def test_vllm_refuses_a_folder_in_which_layers_that_it_fuses_differ(tmp_path, mapping):
    source, base = save_llama(tmp_path / "plain", layers=1), {"torch.nn.Linear": "MXFP4"}
    ignore = ["lm_head"] if mapping else ["lm_head", "*.v_proj"]
    packed = export_checkpoint(source, tmp_path / "p", scheme=base | (mapping or {}), ignore=ignore)
    table = table_of_folder(packed)
    assert "refused: layers that it fuses differ" in row_of(table, "vLLM on Blackwell")
    assert "vLLM fuses model.layers.0.self_attn.q_proj, " in table and "W4A4" in row_of(
        table, "transformers, compressed-tensors"
    )
    whole = table_of_folder(export_checkpoint(source, tmp_path / "whole", scheme="MXFP4"))
    assert "refused: layers" not in whole
