"""Presets against AutoRound's, and the errors of names and rules."""

from __future__ import annotations

import pytest

from qat import SCHEMES, get_scheme
from qat.schemes.presets import input_rules, weight_rules
from qat.schemes.spec import TensorSpec


def test_presets_that_auto_round_has_too_are_the_same():
    from auto_round.schemes import PRESET_SCHEMES, preset_name_to_scheme

    shared = [name for name in SCHEMES if name in PRESET_SCHEMES]
    assert shared == ["MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "NVFP4"]
    for name in shared:
        theirs, ours = preset_name_to_scheme(name), get_scheme(name)
        assert TensorSpec.of(theirs.data_type, theirs.bits, theirs.group_size, theirs.sym) == ours.weight
        assert TensorSpec.of(theirs.act_data_type, theirs.act_bits, theirs.act_group_size, theirs.act_sym) == ours.input
        assert ours.weight.data_type == theirs.data_type
        assert ours.input.data_type == theirs.act_data_type.removesuffix("4_with_static_gs")


@pytest.mark.parametrize(("alias", "scheme"), [("W4A16", "INT4_G128"), ("w4a16g32", "INT4_G32")])
def test_auto_rounds_names_of_integer_schemes_are_aliases(alias, scheme):
    from auto_round.schemes import preset_name_to_scheme

    theirs, ours = preset_name_to_scheme(alias.upper()), get_scheme(alias)
    assert ours == get_scheme(scheme) and theirs.act_bits == 16 and ours.input is None
    assert TensorSpec.of(theirs.data_type, theirs.bits, theirs.group_size, theirs.sym) == ours.weight


def test_fp8_has_a_scale_a_channel_and_a_scale_a_token():
    scheme = get_scheme("fp8")
    assert scheme.weight.format.scale_shape((6, 40)) == (6, 1) and scheme.input.format.scale_shape((2, 5, 40)) == (
        2,
        5,
        1,
    )
    assert scheme.rules == {"weight": "absmax", "input": "absmax"}
    assert (scheme.weight.bits, scheme.weight.block_size, scheme.weight.format.bits_per_value(64)) == (8, -1, 8.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MXFP5",), "'MXFP5' is unknown; choose one of MXFP4, MXFP8"),
        ((4,), "scheme 4 is unknown"),
        (("MXFP4", "absmax"), "'absmax' does not exist for mxfp4; choose one of floor, even, rceil, search"),
        (("MXFP4", None, "search"), "'search' is not possible for inputs in mxfp4; choose one of floor, even, rceil"),
        (("FP8", "floor"), "'floor' does not exist for fp8_channel; choose one of absmax"),
    ],
)
def test_a_name_or_rule_that_does_not_exist_is_an_error_with_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_scheme(*arguments)


def test_rules_of_all_schemes_are_listed_once():
    assert weight_rules() == ("floor", "even", "rceil", "search", "absmax", "absmax_native")
    assert input_rules() == ("floor", "even", "rceil", "absmax", "absmax_native")
