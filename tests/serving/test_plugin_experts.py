"""Experts in the plugin: their tensors are stacked as vLLM loads them, and gates are those of transformers' models."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from qat.checkpoints.dialects.compressed_tensors import CompressedTensors, packed_tensors
from qat.checkpoints.pack_tensors import pack_weight
from qat.schemes.presets import PRESETS

sys.path.insert(0, str(ROOT / "serving"))

from mx_qat_serving import packed_experts  # noqa: E402
from mx_qat_serving.gates import gate_of  # noqa: E402

SCHEMES = {scheme.weight.format.name: scheme for scheme in PRESETS.values()}.values()
EXPERTS, ROWS, COLUMNS = 3, 64, 128


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_stacked_matrices_have_the_values_that_the_library_decompresses(scheme):
    spec, dialect = scheme.weight, CompressedTensors()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(EXPERTS, 2, ROWS, COLUMNS, generator=generator) * torch.rand(EXPERTS, 2, 1, 1) * 3
    loaded = {
        name: tensor
        for name, (tensor, _) in packed_experts.packed_tensors(
            spec.format, (EXPERTS, 2 * ROWS, COLUMNS), shards=(2,)
        ).items()
    }
    expected = torch.empty(EXPERTS, 2 * ROWS, COLUMNS, dtype=torch.bfloat16)
    for e in range(EXPERTS):
        for half, rows in enumerate((slice(0, ROWS), slice(ROWS, None))):
            tensors = packed_tensors(pack_weight(weights[e, half], spec), spec)
            expected[e, rows] = dialect.decompress(tensors, spec)
            for name, tensor in zip(dialect.tensor_names("", spec), tensors, strict=True):
                own = loaded[name.removeprefix(".")]
                if name.endswith("global_scale"):
                    own[e, half] = tensor
                elif name.endswith("shape"):
                    own[e] = tensor
                else:
                    own[e, rows].copy_(tensor)
    assert torch.equal(packed_experts.dequantized(loaded, spec.format, torch.bfloat16), expected)


def test_kinds_of_scales_are_those_of_vllms_loader():
    kinds = {
        scheme.weight.format.name: {
            name: kind
            for name, (_, kind) in packed_experts.packed_tensors(scheme.weight.format, (2, 64, 128)).items()
            if kind
        }
        for scheme in SCHEMES
    }
    assert kinds["mxfp4"] == kinds["mxfp8"] == kinds["int4_g32"] == {"weight_scale": "group"}
    assert kinds["fp8_channel"] == {"weight_scale": "channel"}
    divisors = {"weight_global_scale": "tensor", "input_global_scale": "tensor"}
    assert kinds["nvfp4"] == {"weight_scale": "group"} | divisors


def test_experts_share_the_widest_range_of_inputs_and_one_without_a_scale_is_an_error():
    divisors = torch.tensor([[5.0, 5.0], [4.0, 4.0]])
    assert packed_experts.shared_divisor(divisors).tolist() == [4.0]
    divisors[0, 1] = torch.nan
    with pytest.raises(ValueError, match="has no input_global_scale for some"):
        packed_experts.shared_divisor(divisors)


def test_columns_that_blocks_do_not_divide_are_an_error_that_names_the_remedy():
    with pytest.raises(ValueError, match="96 values .* block size 128 of int4_g128; choose another"):
        packed_experts.check_columns(PRESETS["INT4_G128"].weight.format, 96)


def test_gates_are_those_of_the_models():
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 6
    gate, up = y.chunk(2, -1)
    assert torch.equal(gate_of("silu")(y), F.silu(gate) * up)
    assert torch.equal(gate_of("relu2_no_mul")(y), y.clamp(min=0) ** 2)
    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=2)
    experts = GptOssExperts(config)
    assert (y.abs() > config.swiglu_limit).any()
    assert torch.equal(gate_of("swigluoai", config.swiglu_limit)(y), experts._apply_gate(y))


@pytest.mark.parametrize(("activation", "limit"), [("situ", None), ("silu", 7.0), ("swigluoai", 5.0)])
def test_an_activation_that_the_plugin_lacks_is_an_error_that_names_the_others(activation, limit):
    with pytest.raises(ValueError, match=f"no experts with {activation}.*it has silu, gelu"):
        gate_of(activation, limit)
