"""benchmarks/profile_step.py sorts a trace's kernels into categories; profile_limits.py says what these must move."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from benchmarks.profile_limits import Sizes, fp8_operations, least_bytes, operations
from benchmarks.profile_step import ORDER, Profile, category_of
from benchmarks.profile_trace import Kernel, busy, kernels_of

TINY = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                   num_key_value_heads=1, vocab_size=10, tie_word_embeddings=False)  # fmt: skip
TOKENS, VOCABULARY = 8192, 32000
NODE = "autograd::engine::evaluate_function: "
PRODUCT, WEIGHT = ((TOKENS, 4096), (4096, 1024)), ((1024, TOKENS), (TOKENS, 4096))
HEAD, OUT = ((2048, 4096), (4096, VOCABULARY)), ((1024, 4096),)
FP8 = ("mx_qat::_rows_product", "aten::_scaled_mm")
KERNELS = [  # category, name, operators, modules, shapes, whether in the backward pass
    ("products, forward", "nvjet_sm90_qqtst", FP8, ("LlamaMLP", "QuantLinear"), PRODUCT, False),
    ("products, forward", "nvjet_sm90_tst", ("aten::addmm",), ("Linear",), ((1024,), *PRODUCT), False),
    ("products, forward", "Memset (Device)", ("aten::mm",), ("QuantLinear",), PRODUCT, False),
    ("products, backward weight", "nvjet_sm90_tss", ("aten::mm",), ("QuantLinear",), WEIGHT, True),
    ("products, backward weight", "nvjet_sm90_tss", ("mx_qat::product_in_fp32", "aten::mm"), (), WEIGHT, True),
    ("products, backward weight", "nvjet_sm90_tss", ("CompiledFunctionBackward", "aten::mm"), (), WEIGHT + OUT, True),
    ("products, backward weight", "nvjet_sm90_tss", ("aten::addmm",), (), OUT + WEIGHT + OUT, True),
    ("products, backward input", "nvjet_sm90_tst", ("aten::mm",), ("QuantLinear",), PRODUCT, True),
    ("products, backward input", "nvjet_sm90_tst", ("aten::mm",), (), ((TOKENS, TOKENS), (TOKENS, 64)), True),
    ("products, head", "nvjet_sm90_tst", ("_ChunkedLoss", "aten::mm"), (), PRODUCT, False),
    ("products, head", "nvjet_sm90_tst", (NODE + "_ProductBackward", "aten::mm"), (), HEAD, True),
    ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", (), ("LlamaAttention",), (), True),
    ("attention", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80", (), (), (), False),
    ("rounding", "rows_kernel", (), ("QuantLinear",), (), False),
    ("rounding", "repair_kernel", ("mx_qat::_rows_product",), ("QuantLinear",), (), False),
    ("loss", "_kl_backward_kernel", (NODE + "ForwardKLBackward",), (), (), True),
    ("loss", "indexing_backward_kernel<float>", (NODE + "IndexBackward0", "IndexBackward0"), (), (), True),
    ("loss", "vectorized_elementwise_kernel", ("_ChunkedLoss", "aten::mul"), (), (), False),
    ("rope", "gemmSN_NN_kernel", ("aten::bmm",), ("LlamaModel", "LlamaRotaryEmbedding"), (), False),
    ("casts and copies", "triton_poi_fused__unsafe_view_clone_expand_transpose_unsqueeze_4", (), (), (), False),
    ("casts and copies", "triton_poi_fused__to_copy_t_1", (), (), (), True),
    ("residual adds", "triton_poi_fused__to_copy_add_view_1", (), (), (), True),
    ("norms", "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2", (), (), (), False),
    ("norms", "reduce_kernel<128, 4>", (NODE + "MulBackward0", "aten::sum"), (), (), True),
    ("norms", "vectorized_elementwise_kernel", ("aten::mul",), ("LlamaRMSNorm",), (), False),
    ("silu * up", "vectorized_elementwise_kernel", (NODE + "MulBackward0", "aten::mul"), ("LlamaMLP",), (), True),
    ("optimizer", "multi_tensor_apply_kernel<FusedOptimizer", ("Optimizer.step#AdamW.step",), (), (), False),
    ("other", "something_new", (), (), (), False),
]


@pytest.mark.parametrize(("category", "name", "operators", "modules", "shapes", "is_backward"), KERNELS)
def test_kernels_are_sorted_by_operator_module_name_and_shapes(category, name, operators, modules, shapes, is_backward):
    kernel = Kernel(name, 0.0, 1.0, operators, shapes, modules, is_backward)
    assert category_of(kernel, TOKENS, VOCABULARY) == category


# ---- Traces ----


def host(name: str, start: float, duration: float, thread: int = 1, **args) -> dict:
    cat = "user_annotation" if name.startswith(("module: ", "mx_qat::")) else "cpu_op"
    return {"ph": "X", "cat": cat, "name": name, "tid": thread, "ts": start, "dur": duration, "args": args}


def launched(name: str, at: float, start: float, duration: float, number: int, thread: int = 1) -> list[dict]:
    """A call at a time of the processor, and the kernel that it starts."""
    call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": thread, "ts": at, "dur": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": name, "tid": 7, "ts": start, "dur": duration}
    return [{**event, "args": {"correlation": number}} for event in (call, kernel)]


def test_a_kernel_belongs_to_the_module_whose_forward_operator_made_its_backward_node():
    flow = {"cat": "fwdbwd", "name": "fwdbwd", "id": 5}
    events = [
        host("module: LlamaMLP", 0, 100), host("module: LlamaRMSNorm", 10, 20), host("aten::mul", 12, 5),
        host("aten::silu", 40, 5),
        {**flow, "ph": "s", "tid": 1, "ts": 12}, {**flow, "ph": "f", "tid": 2, "ts": 200},
        host(NODE + "MulBackward0", 200, 50, 2), host("aten::mul", 210, 5, 2),
        host("module: LlamaMLP", 220, 20, 2), host("aten::mul", 225, 5, 2),
        *launched("first", 13, 50, 10, 1), *launched("silu", 41, 60, 5, 2),
        *launched("back", 211, 300, 4, 3, 2), *launched("again", 226, 310, 4, 4, 2), *launched("odd", 400, 500, 1, 5),
    ]  # fmt: skip
    kernels = kernels_of(events, "cuda")
    assert [(k.name, k.modules[-1:], k.is_backward) for k in kernels] == [
        ("first", ("LlamaRMSNorm",), False), ("silu", ("LlamaMLP",), False), ("back", ("LlamaRMSNorm",), True),
        ("again", ("LlamaMLP",), False), ("odd", (), False),
    ]  # fmt: skip
    assert [category_of(k, 64, 10) for k in kernels] == ["norms", "silu * up", "norms", "silu * up", "other"]
    assert busy(kernels) == 10 + 5 + 4 + 4 + 1


def test_products_are_told_apart_by_what_they_sum_over():
    def product(shapes, *around):
        events = [*(host(name, i, 100) for i, name in enumerate(around)),
                  host("aten::mm", 50, 10, **{"Input Dims": shapes}), *launched("nvjet_tst", 52, 60, 3, 1)]  # fmt: skip
        return category_of(kernels_of(events, "cuda")[0], 64, 100)

    node = NODE + "MmBackward0"
    assert product([[64, 8], [8, 16]]) == "products, forward"
    assert product([[64, 16], [16, 8]], node) == "products, backward input"
    assert product([[16, 64], [64, 8]], node) == "products, backward weight"
    assert product([[16, 64], [64, 8], [], [16, 8]], node) == "products, backward weight"  # and a place for the result
    assert product([[16, 64], [64, 8]], "_ChunkedLoss", node) == "products, head"
    assert product([[100, 64], [64, 8]], node) == "products, head"  # of that vocabulary
    assert product([[64, 8], [8, 16]], node, "module: Linear") == "products, forward"  # recomputed


# ---- Limits ----


def test_limits_are_those_counted_by_hand():
    plain = Sizes(TINY, rows=2, length=5)
    weights, head, stream = 3 * (8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16), 80, 2 * 5 * 8 * 4
    assert (plain.block_weights, plain.parameters) == (weights, weights + 2 * head + 7 * 8)
    tied = replace(plain, config=LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": True}))
    assert tied.parameters == plain.parameters - head
    limits = least_bytes(plain)
    assert limits["optimizer"] == plain.parameters * 28 and "rounding" not in limits
    assert limits["norms"] == 7 * 5 * stream
    assert limits["silu * up"] == 3 * 10 * 16 * 2 * 8
    normed = 10 * 8 * 2 * 3  # what norms give is FP32
    assert limits["casts and copies"] == 6 * (weights + head) + 6 * weights + 6 * normed * 2
    quantized = replace(plain, rounds_weights=True, code_bits=4.25)
    inputs, code = 3 * 10 * (8 + 8 + 8 + 16), 4.25 / 8
    assert least_bytes(quantized)["rounding"] == weights * 12 + inputs * 4 + normed * 2 + inputs * (2 * code + 2)
    assert least_bytes(quantized)["casts and copies"] == 6 * head + 6 * normed
    in_fp8 = replace(quantized, in_fp8=True)
    forward = weights * 5 + inputs * 3 + normed * 2
    backward = weights * 6 + inputs * (2 * code + 2)
    assert least_bytes(in_fp8)["rounding"] == forward + backward
    assert least_bytes(replace(in_fp8, recomputed=True))["rounding"] == 2 * forward + backward


def test_operations_in_fp8_are_those_of_the_students_forward_products():
    plain = Sizes(TINY, rows=2, length=5, teacher=True)
    product = 2 * 10 * plain.block_weights
    assert operations(plain)["products, backward weight"] == product
    assert operations(plain)["products, forward"] == 2 * product and fp8_operations(plain) == 0
    in_fp8 = replace(plain, recomputed=True, in_fp8=True)
    assert operations(in_fp8)["products, forward"] == 3 * product and fp8_operations(in_fp8) == 2 * product


# ---- A step ----


@pytest.mark.parametrize("scheme", [None, "MXFP4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_cpu_has_its_operators_in_the_rows(scheme, checkpointing):
    args = argparse.Namespace(shape="tiny", layers=1, batch=2, length=40, checkpointing=checkpointing, compile=False,
                              distill=scheme is not None, repeats=1, device="cpu", fp8_matmul="auto")  # fmt: skip
    profile = Profile(args, scheme)
    rows = profile.rows(1e9, 1e9, 2e9)
    assert list(rows) == list(ORDER) and not profile.sizes.in_fp8
    assert sum(rows[name][1] for name in ORDER[:-2]) == rows["step"][1] == len(profile.kernels)
    assert (rows["rounding"][1] > 0) == (scheme is not None)
    # Where main.py has replaced PyTorch's slow BF16 products (cpu_bfloat16.py), a product calls one in FP32.
    called = [k for k in profile.kernels if k.name == "aten::mm" and "aten::mm" not in k.operators[:-1]]
    products = [k for k in called if k.shapes and k.duration]
    found = [profile.category(k) for k in products]
    assert found.count("products, backward weight") == 7
    assert found.count("products, forward") == 7 * (1 + checkpointing + (scheme is not None))
    assert found.count("products, head") == 3 + (scheme is not None)
