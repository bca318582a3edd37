"""A sample of the sweep over families, and what keeps its list complete; scripts/test_families.sh runs all of it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families.configs import OVERRIDES, SMALL, small_config
from families.entries import FAILED, PROVEN, REFUSED, SURVEYED, Expected, entries
from families.expected import EXPECTED
from families.models import save_tiny
from families.run import complaint_about, run
from families.trial import Result


@pytest.mark.parametrize("entry", ["mixtral", "nemotron", "gemma3"])
def test_a_family_ends_in_a_proven_folder_with_nearly_all_of_its_linear_weights_quantized(entry, tmp_path):
    result = run(entry, tmp_path, seconds=100)
    assert result.outcome == PROVEN, (tmp_path / entry / "log.txt").read_text()[-3000:]
    assert result.share > 0.98 and re.match("[1-9]", result.smoothed)


def test_the_list_has_every_causal_family_of_transformers_and_those_surveyed():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(entries())
    assert len(SURVEYED) == len(set(SURVEYED)) == 79 and set(SURVEYED) <= set(entries())


def test_the_tables_name_entries_only():
    assert set(EXPECTED) <= set(entries()) and set(OVERRIDES) <= set(entries())


@pytest.mark.parametrize("entry", ["qwen3_moe", "deepseek_v3", "falcon_h1"])
def test_a_configuration_is_tiny_and_takes_its_fields_from_the_table(entry):
    config = small_config(entry)
    assert config.hidden_size == SMALL["hidden_size"] and config.vocab_size == SMALL["vocab_size"]
    assert config.num_hidden_layers <= 4


def test_no_parameter_of_a_tiny_model_has_a_value_that_a_dropped_tensor_would_have(tmp_path):
    from safetensors.torch import load_file

    save_tiny("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    constant = [name for name, tensor in tensors.items() if tensor.float().std() == 0]
    assert not constant


@pytest.mark.parametrize(
    "outcome,message,expected,complains",
    [
        (PROVEN, "", None, False),
        (FAILED, "a crash", None, True),
        (REFUSED, "cannot be packed", Expected(REFUSED, "cannot be", "why"), False),
        (REFUSED, "another message", Expected(REFUSED, "cannot be", "why"), True),
        (PROVEN, "", Expected(REFUSED, "cannot be", "why"), True),
    ],
)
def test_an_outcome_other_than_the_expected_one_is_complained_about(outcome, message, expected, complains, monkeypatch):
    monkeypatch.setattr("families.run.EXPECTED", {"new_family": expected} if expected else {})
    complaint = complaint_about(Result("new_family", outcome, message=message))
    assert ("tests/families/expected.py" in complaint) == complains == bool(complaint)
