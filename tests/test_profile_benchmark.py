"""benchmarks/profile_step.py sorts kernels into kinds, and derives limits from sizes."""

import pytest

from benchmarks import profile_step

NAMES = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
    "nvjet_sm90_qqtst_128x128_128x6_1x1_h_bz_coopA_algo2_ovscale_TNT": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizer": "optimizer",
    "rows_kernel": "rounding",
    "fake_quantize_kernel": "rounding",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorI": "casts and copies",
    "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda(at::": "casts and copies",
    "void at::native::vectorized_elementwise_kernel<4, at::CUDAFunctor_add<float>": "products and sums of elements",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float": "softmax and loss",
    "something_new": "other",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kernels_are_sorted_by_their_names(name, kind):
    assert profile_step.kind_of(name) == kind


def test_limits_follow_from_the_bytes_that_a_kind_must_move():
    sizes = profile_step.Sizes(parameters=100, linear=60, tokens=2, hidden=3, intermediate=7, layers=5)
    limits = sizes.limits(in_fp8=True)
    assert limits["optimizer"] == (2800, 2800)
    assert limits["casts and copies"] == (720, 0)
    assert limits["rounding"] == (0, int(60 * 11 + 5 * 2 * (3 * 3 + 7) * (2 + 1 + 17 / 16 + 2)))


def test_a_row_adds_up_its_kernels_and_the_rest_of_the_step_is_idle():
    found = [{"nvjet_a": (4.0, 2), "gemm_b": (1.0, 1)}, {"nvjet_a": (3.0, 2), "rows_kernel": (2.0, 4)}]
    rows = {row["kind"]: row for row in profile_step.table(found, [6e-3, 5e-3], {"rounding": (0, 1000)}, 1e6)}
    assert rows["matrix products"]["ms_0"] == 5.0 and rows["matrix products"]["kernels_0"] == 3
    rounding = rows["rounding"]
    assert (rounding["ms_0"], rounding["ms_1"], rounding["kernels_1"], rounding["limit_ms_1"]) == (0.0, 2.0, 4, 1.0)
    assert rows["idle"]["ms_0"] == 1.0 and rows["idle"]["ms_1"] == 0.0
