"""Calibration: what a model is like afterwards, and inputs that are not there."""

from __future__ import annotations

import pytest
import torch
from helpers import make_llama
from torch import nn

from qat import prepare_qat
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs, calibrated_scales

IDS = torch.arange(3, 15)[None]
SCHEME = {nn.Linear: "NVFP4"}


class Expert(nn.Module):
    """A router's view of an expert: only the first `count` rows reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return self.up(x[:count])


def test_every_module_has_its_own_mode_again():
    model = prepare_qat(make_llama(layers=1).train(), SCHEME)
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate_inputs(model, [{"input_ids": IDS}])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_an_error_leaves_no_hooks_and_no_disabled_quantizers():
    model = prepare_qat(make_llama(layers=1), SCHEME)
    with pytest.raises(IndexError):
        calibrate_inputs(model, [{"input_ids": IDS}, {"input_ids": IDS + 10_000}])
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training
    assert model.model.layers[0].mlp.up_proj.input_quantizer.is_enabled and not calibrated_scales(model)


def test_batches_without_a_token_for_a_layer_do_not_count():
    model, x = prepare_qat(Expert(), SCHEME, ()), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    calibrate_inputs(model, [{"x": x, "count": count} for count in (0, 2, 0)])
    assert calibrated_scales(model)["up.input_global_scale"] == pytest.approx(448 * 6 / float(x[:2].abs().max()))
    with pytest.raises(UserError, match="the input of up has the largest magnitude 0.0 in the samples"):
        calibrate_inputs(model, [{"x": x, "count": 0}])


def test_a_compiled_model_calibrates_as_the_plain_one_also_a_second_time():
    model = prepare_qat(Expert(), SCHEME, ())
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 64)
    calibrate_inputs(model, [{"x": x, "count": 5}])
    for factor in (2.0, 3.0):
        compiled(x, 5).sum().backward()
        calibrate_inputs(model, [{"x": x * factor, "count": 5}], forward=compiled)
        expected = 448 * 6 / float((x * factor).abs().max())
        assert calibrated_scales(model)["up.input_global_scale"] == pytest.approx(expected)


def test_an_ignored_layer_takes_no_part_in_the_scale_of_those_that_it_is_fused_with():
    model = prepare_qat(make_llama(layers=1), {**SCHEME, "*.v_proj": "NVFP4A16"}, ("lm_head", "k_proj"))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.fused_with == (attention.q_proj, attention.v_proj)  # the divisor of weights
    calibrate_inputs(model, [{"input_ids": IDS}])
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in calibrated_scales(model)}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
