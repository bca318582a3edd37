"""The plugin reads from a checkpoint how inputs are quantized, and from the environment under which rule."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from compressed_tensors.quantization import QuantizationArgs
from helpers import ROOT

from qat.checkpoints.dialects.compressed_tensors import quantization_args
from qat.schemes.presets import PRESETS

sys.path.insert(0, str(ROOT / "serving"))

from mx_qat_serving.formats import RULE_VARIABLE, chosen_rules, format_of, input_format, known_format, rule_for  # noqa: E402


def layer_of(inputs: QuantizationArgs | None):
    """A layer as vLLM's reader of compressed-tensors makes it."""
    config = SimpleNamespace(get_scheme_dict=lambda layer, name: {"input_activations": inputs} if name == "q" else None)
    return SimpleNamespace(prefix="q", quant_method=SimpleNamespace(quantization_config=config))


@pytest.mark.parametrize("scheme", PRESETS.values(), ids=PRESETS)
def test_the_inputs_of_every_scheme_are_found_in_what_the_dialect_writes(scheme):
    fmt = scheme.input and scheme.input.format
    args = None if fmt is None else QuantizationArgs(**quantization_args(fmt, dynamic=True))
    assert input_format(layer_of(args), "the weight's") == (None if fmt is None else fmt.name)


@pytest.mark.parametrize("scheme", PRESETS.values(), ids=PRESETS)
def test_the_weights_of_every_scheme_are_found_in_what_the_dialect_writes(scheme):
    fmt = scheme.weight.format
    assert known_format(QuantizationArgs(**quantization_args(fmt, dynamic=False))) == fmt.name


@pytest.mark.parametrize(
    "other",
    [
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ],
    ids=["zero points", "group size", "INT8"],
)
def test_what_looks_like_a_format_and_is_none_is_not_taken_for_it(other):
    assert known_format(QuantizationArgs(**other)) is None


def test_columns_in_the_order_of_their_activations_are_no_format_of_the_library():
    plain = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32)
    assert known_format(plain) == "int4_g32"
    assert known_format(plain.model_copy(update={"actorder": "group"})) is None  # as older versions read it


def test_other_checkpoints_quantize_inputs_as_weights_and_unknown_inputs_are_refused():
    assert input_format(SimpleNamespace(quant_method=SimpleNamespace()), "mxfp4") == "mxfp4"
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    with pytest.raises(ValueError, match="no kernel for inputs of"):
        format_of(args)


@pytest.mark.parametrize(
    ("chosen", "fmt", "rule"),
    [
        (None, "mxfp4", "even"),
        (None, "nvfp4", "absmax"),
        ("", "fp8_token", "absmax"),
        ("floor", "mxfp8", "floor"),
        ("floor,absmax_native", "fp8_g128", "absmax_native"),
        ("NONE", "mxfp4", None),
    ],
)
def test_a_format_takes_the_first_chosen_rule_that_it_has(monkeypatch, chosen, fmt, rule):
    monkeypatch.delenv(RULE_VARIABLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(RULE_VARIABLE, chosen)
    assert rule_for(fmt) == rule


def test_a_rule_that_does_not_exist_or_not_for_the_format_is_an_error(monkeypatch):
    monkeypatch.setenv(RULE_VARIABLE, "flor")
    with pytest.raises(ValueError, match="names 'flor'; choose among none, floor, even, rceil, absmax, absmax_native"):
        chosen_rules()
    monkeypatch.setenv(RULE_VARIABLE, "floor")
    with pytest.raises(ValueError, match="no rule for activations in nvfp4; add one of absmax, absmax_native"):
        rule_for("nvfp4")
