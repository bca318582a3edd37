"""benchmarks/profile_step.py sorts kernels into categories, and profile_limits.py derives what these must move."""

import pytest
from transformers import LlamaConfig

from benchmarks.profile_limits import Sizes, least_bytes, operations
from benchmarks.profile_step import category_of
from benchmarks.profile_trace import Kernel

TOKENS = 8192
PRODUCT, WEIGHT = ((TOKENS, 4096), (4096, 1024)), ((1024, TOKENS), (TOKENS, 4096))
KERNELS = {  # name, operators, modules, shapes, whether in the backward pass
    "products, forward": ("nvjet_sm90_qqtst", ("aten::_scaled_mm",), ("LlamaMLP", "QuantLinear"), PRODUCT, False),
    "products, backward weight": ("nvjet_sm90_tss", ("aten::mm",), ("QuantLinear",), WEIGHT, True),
    "products, backward input": ("nvjet_sm90_tst", ("aten::mm",), ("QuantLinear",), PRODUCT, True),
    "products, head": ("nvjet_sm90_tst", ("_ChunkedLoss", "aten::mm"), (), PRODUCT, False),
    "attention": ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", (), ("LlamaAttention",), (), True),
    "rounding": ("rows_kernel", (), ("QuantLinear",), (), False),
    "optimizer": ("multi_tensor_apply_kernel<FusedOptimizer", ("Optimizer.step#AdamW.step",), (), (), False),
    "norms": ("vectorized_elementwise_kernel", ("aten::mul",), ("LlamaRMSNorm",), (), False),
    "other": ("something_new", (), (), (), False),
}


@pytest.mark.parametrize("category", KERNELS)
def test_kernels_are_sorted_by_operator_module_and_name(category):
    name, operators, modules, shapes, is_backward = KERNELS[category]
    assert category_of(Kernel(name, 0.0, 1.0, operators, shapes, modules, is_backward), TOKENS) == category


def test_limits_are_those_of_the_shapes():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    sizes = Sizes(config, rows=2, length=5, rounds_weights=True, code_bits=4.25)
    block = 8 * (8 + 8) + 8 * 8 + 3 * 8 * 16
    assert sizes.block_weights == 3 * block
    assert sizes.parameters == 3 * block + 32 * 8 + 7 * 8
    bytes_, plain = least_bytes(sizes), least_bytes(Sizes(config, rows=2, length=5))
    assert bytes_["optimizer"] == 28 * sizes.parameters and "rounding" not in plain
    inputs = 3 * 10 * (8 + 8 + 8 + 16)
    wide = 3 * 2 * 10 * 8  # what norms give is FP32
    assert bytes_["rounding"] == 3 * block * 12 + inputs * 4 + wide * 2 + inputs * (2 * 4.25 / 8 + 2)
    assert operations(sizes)["products, forward"] == 2 * 10 * 3 * block
