"""Layers whose forward products are computed from E4M3 rows, and which layers these are."""

import copy

import pytest
import torch
from torch import nn

from qat import prepare_qat
from qat.errors import UserError
from qat.layers import fp8_matmul
from qat.layers.adapted import attach
from qat.layers.fp8_matmul import linear_products, log_fp8_matmul, use_fp8_matmul

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def model_of(scheme: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 16, bias=False))
    prepare_qat(model, {"0": scheme, "4": scheme}, ignore=["2"], **options)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of the first layer, and the gradients of its input and its parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    y.float().square().sum().backward()
    return [y, x.grad, *(p.grad for p in model[0].parameters() if p.grad is not None)]


def input_with_lost_rows() -> torch.Tensor:
    x = torch.randn(2, 5, 64)
    x[1, 2, :32] *= 1e-9
    return x


@pytest.mark.parametrize("scheme", ["MXFP4", "FP8", "MXFP4FP8"])
@pytest.mark.parametrize("prepare", ["plain", "adapter"])
def test_outputs_and_gradients_are_those_of_products_in_bf16(scheme, prepare):
    model = model_of(scheme)
    if prepare == "adapter":
        attach(model[0], torch.randn(4, 64), torch.randn(48, 4) / 10, 0.5)
    in_fp8 = copy.deepcopy(model)
    in_fp8[0].in_fp8 = True
    x = input_with_lost_rows()
    for expected, found in zip(gradients(model, x), gradients(in_fp8, x), strict=True):
        # BF16 products round once more where scales are no powers of two.
        tolerance = 2**-7 if scheme == "MXFP4" else 2**-5
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )


def test_what_is_kept_for_backward_is_the_codes_as_without_fp8():
    sizes = {}
    for in_fp8 in (False, True):
        model, saved = model_of("MXFP4"), []
        model[0].in_fp8 = in_fp8
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model[0](torch.randn(8, 64, requires_grad=True))
        sizes[in_fp8] = sorted((t.dtype, tuple(t.shape)) for t in saved if t.dtype == torch.uint8)
    assert sizes[True] == sizes[False] == [(torch.uint8, (8, 2)), (torch.uint8, (8, 32))]


def test_the_input_is_converted_once_for_layers_that_share_it(monkeypatch):
    model, calls = model_of("MXFP4"), []
    both = [model[0], copy.deepcopy(model[0])]
    convert = fp8_matmul.ops.to_rows
    monkeypatch.setattr(fp8_matmul.ops, "to_rows", lambda x, *a, **k: calls.append(x.shape) or convert(x, *a, **k))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in both:
            layer.in_fp8 = True
            layer(x)
    assert calls.count(x.shape) == 1 and calls.count(model[0].weight.shape) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_in_other_dtypes_than_bf16_stay_as_they_are(dtype):
    model = model_of("MXFP4").to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    expected = model(x) if dtype == torch.float32 else model[0](x)
    for layer in linear_products(model).values():
        layer.in_fp8 = True
    assert torch.equal(model(x) if dtype == torch.float32 else model[0](x), expected)


def test_a_compiled_layer_computes_the_same():
    model = model_of("MXFP4")
    model[0].in_fp8 = True
    x = input_with_lost_rows()
    expected = gradients(model, x)
    model.zero_grad()
    compiled = copy.deepcopy(model)
    compiled[0].forward = torch.compile(compiled[0].forward, backend="aot_eager", fullgraph=True)
    for a, b in zip(expected, gradients(compiled, x), strict=True):
        assert torch.equal(a, b)


def test_on_needs_a_gpu_that_multiplies_in_fp8():
    with pytest.raises(UserError, match="--fp8_matmul on is not possible: the run is on CPU"):
        use_fp8_matmul(model_of("MXFP4"), "on", CPU)
    assert use_fp8_matmul(model_of("MXFP4"), "auto", CPU) == []


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that can, as far as the choice of layers goes."""
    monkeypatch.setattr(fp8_matmul, "why_not", lambda device: None)
    monkeypatch.setattr(fp8_matmul.ops, "lost_rows", lambda device: None)


def test_layers_are_chosen_by_their_formats_and_shapes(gpu):
    assert use_fp8_matmul(model_of("MXFP4"), "auto", GPU) == ["0", "4"]
    assert use_fp8_matmul(model_of("FP8"), "on", GPU) == ["0", "4"]
    assert use_fp8_matmul(model_of("MXFP4"), "off", GPU) == []
    for scheme in ("MXFP8", "NVFP4", "MXFP4A16", "INT4_G32"):
        assert use_fp8_matmul(model_of(scheme), "auto", GPU) == []
        with pytest.raises(UserError, match="no linear layer has both its weight and its input in formats that fit"):
            use_fp8_matmul(model_of(scheme), "on", GPU)
    odd = nn.Sequential(nn.Linear(64, 40))
    prepare_qat(odd, {nn.Linear: "MXFP4"})
    assert use_fp8_matmul(odd, "auto", GPU) == []


def test_layers_that_learn_their_exponents_are_not_chosen(gpu):
    assert use_fp8_matmul(model_of("MXFP4", learn_exponent=True), "auto", GPU) == []


def test_the_choice_can_be_undone(gpu):
    model = model_of("MXFP4")
    use_fp8_matmul(model, "auto", GPU)
    assert [layer.in_fp8 for layer in linear_products(model).values()] == [True, True]
    use_fp8_matmul(model, "off", GPU)
    assert [layer.in_fp8 for layer in linear_products(model).values()] == [False, False]


def test_the_log_says_which_products_are_in_fp8(gpu, caplog, monkeypatch):
    caplog.set_level("INFO")
    model = model_of("MXFP4")
    log_fp8_matmul(model, ["0"], "auto", GPU)
    assert "Forward products of 1 of 2 quantized linear layers are computed in FP8" in caplog.text
    monkeypatch.setattr(fp8_matmul, "why_not", lambda device: "Triton is not installed")
    log_fp8_matmul(model, [], "auto", GPU)
    assert "computed in BF16, not in FP8: Triton is not installed" in caplog.text
