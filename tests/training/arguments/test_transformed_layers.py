"""--input_transform: without patterns, or with auto, it is for all layers that an engine serves so."""

from __future__ import annotations

import pytest

from training.arguments.quantization import QuantizationArguments


@pytest.mark.parametrize(
    ("transform", "layers", "expected"),
    [
        ("hadamard", None, "hadamard"),
        ("hadamard", ["auto"], "hadamard"),
        ("hadamard", ["*.o_proj", "down_proj"], {"*.o_proj": "hadamard", "down_proj": "hadamard"}),
        ("none", None, {}),
        ("none", ["auto"], {}),
    ],
)
def test_what_the_arguments_ask_for_is_what_prepare_qat_is_given(transform, layers, expected):
    args = QuantizationArguments(quant_scheme="MXFP4", input_transform=transform, input_transform_layers=layers)
    assert args.input_transforms == expected
