"""What benchmarks/profile_step.py makes of a trace, and its limits by hand."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from benchmarks.profile_limits import Sizes, least_bytes, operations
from benchmarks.profile_step import ORDER, Profile, category_of
from benchmarks.profile_trace import busy, kernels_of

TINY = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                   num_key_value_heads=1, vocab_size=10, tie_word_embeddings=False)  # fmt: skip


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
        host("autograd::engine::evaluate_function: MulBackward0", 200, 50, 2), host("aten::mul", 210, 5, 2),
        host("module: LlamaMLP", 220, 20, 2), host("aten::mul", 225, 5, 2),
        *launched("first", 13, 50, 10, 1), *launched("silu", 41, 60, 5, 2),
        *launched("back", 211, 300, 4, 3, 2), *launched("again", 226, 310, 4, 4, 2), *launched("odd", 400, 500, 1, 5),
    ]  # fmt: skip
    kernels = kernels_of(events, "cuda")
    assert [(k.name, k.modules[-1:], k.is_backward) for k in kernels] == [
        ("first", ("LlamaRMSNorm",), False), ("silu", ("LlamaMLP",), False), ("back", ("LlamaRMSNorm",), True),
        ("again", ("LlamaMLP",), False), ("odd", (), False),
    ]  # fmt: skip
    assert [category_of(k, 64) for k in kernels] == ["norms", "silu * up", "norms", "silu * up", "other"]
    assert busy(kernels) == 10 + 5 + 4 + 4 + 1


def test_products_are_told_apart_by_what_they_sum_over():
    def product(shapes, *around):
        events = [*(host(name, i, 100) for i, name in enumerate(around)),
                  host("aten::mm", 50, 10, **{"Input Dims": shapes}), *launched("nvjet_tst", 52, 60, 3, 1)]  # fmt: skip
        return category_of(kernels_of(events, "cuda")[0], 64)

    node = "autograd::engine::evaluate_function: MmBackward0"
    assert product([[64, 8], [8, 16]]) == "products, forward"
    assert product([[64, 16], [16, 8]], node) == "products, backward input"
    assert product([[16, 64], [64, 8]], node) == "products, backward weight"
    assert product([[16, 64], [64, 8]], "module: head", node) == "products, head"
    assert product([[64, 8], [8, 16]], node, "module: Linear") == "products, forward"  # recomputed


def test_limits_are_those_counted_by_hand():
    plain = Sizes(TINY, rows=2, length=5)
    weights, head, stream = 3 * (8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16), 80, 2 * 5 * 8 * 4
    assert (plain.block_weights, plain.parameters) == (weights, weights + 2 * head + 7 * 8)
    limits = least_bytes(plain)
    assert limits["optimizer"] == plain.parameters * 28 and "rounding" not in limits
    assert limits["norms"] == 7 * 5 * stream
    assert limits["silu * up"] == 3 * 10 * 16 * 2 * 8
    normed = 10 * 8 * 2 * 3
    assert limits["casts and copies"] == 6 * (weights + head) + 6 * weights + 6 * normed * 2
    quantized = least_bytes(replace(plain, rounds_weights=True, code_bits=4.25))
    inputs = 3 * 10 * (8 + 8 + 8 + 16)
    assert quantized["rounding"] == weights * 12 + inputs * 4 + normed * 2 + inputs * (2 * 4.25 / 8 + 2)
    assert quantized["casts and copies"] == 6 * head + 6 * weights + 6 * normed
    assert operations(plain)["products, backward weight"] == 2 * 10 * weights
    assert operations(replace(plain, recomputed=True))["products, forward"] == 4 * 10 * weights


@pytest.mark.parametrize("scheme", [None, "MXFP4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_cpu_has_its_operators_in_the_rows(scheme, checkpointing):
    args = argparse.Namespace(shape="tiny", layers=1, batch=2, length=40, checkpointing=checkpointing, compile=False,
                              distill=scheme is not None, repeats=1, device="cpu")  # fmt: skip
    profile = Profile(args, scheme)
    rows = profile.rows(1e9, 1e9)
    assert list(rows) == list(ORDER)
    assert sum(rows[name][1] for name in ORDER[:-2]) == rows["step"][1] == len(profile.kernels)
    assert (rows["rounding"][1] > 0) == (scheme is not None)
    products = [k for k in profile.kernels if k.name == "aten::mm" and k.shapes and k.duration]
    found = [category_of(k, 80) for k in products]
    assert found.count("products, backward weight") == 7
    assert found.count("products, forward") == 7 * (1 + checkpointing + (scheme is not None))
