"""RMS norms of a teacher, replaced by one kernel where it computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_llama
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from training.teachers.norms import use_one_kernel

CPU = torch.device("cpu")


def test_a_teacher_computes_what_it_computed():
    plain = make_llama().to(torch.bfloat16).eval()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, LlamaRMSNorm):
                module.weight.uniform_(0.5, 2)
    fused = copy.deepcopy(plain)
    assert use_one_kernel(fused.model, CPU) == 2 * len(plain.model.layers) + 1
    ids = torch.arange(40)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0.03, atol=0.03)
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_and_their_dtype_are_those_of_the_module_under_autocast_too(dtype):
    module = nn.Sequential(LlamaRMSNorm(64, eps=1e-5)).to(dtype)
    module[0].weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 7, 64).to(dtype)
    expected = module(x)
    assert use_one_kernel(module, CPU) == 1
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class RoundedLateRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states.float()).to(hidden_states.dtype)


@pytest.mark.parametrize("kind", [GemmaRMSNorm, ShiftedRMSNorm, RoundedLateRMSNorm])
def test_a_norm_that_computes_otherwise_is_left_alone(kind):
    module = nn.Sequential(kind(64, eps=1e-5)).to(torch.bfloat16)
    assert use_one_kernel(module, CPU) == 0 and "forward" not in vars(module[0])


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * gate


class TwoDimensionalRMSNorm(LlamaRMSNorm):
    def __init__(self, size, eps):
        super().__init__(size, eps)
        self.weight = nn.Parameter(torch.ones(2, size))


class CountingRMSNorm(LlamaRMSNorm):
    def __init__(self, size, eps):
        super().__init__(size, eps)
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.shift


@pytest.mark.parametrize("kind", [GatedRMSNorm, TwoDimensionalRMSNorm, CountingRMSNorm])
def test_a_norm_of_another_signature_or_other_tensors_is_left_alone(kind):
    module = nn.Sequential(kind(64, eps=1e-5))
    assert use_one_kernel(module, CPU) == 0


def test_a_norm_is_left_alone_that_rounds_late_what_autocast_gives_it():
    module = nn.Sequential(RoundedLateRMSNorm(64, eps=1e-5))  # in FP32, where only BF16 inputs tell
    assert use_one_kernel(module, CPU) == 0


class ScaledRMSNorm(LlamaRMSNorm):
    """With a factor that is a setting of each."""

    factor = 1.0

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.factor


def test_norms_of_one_class_with_other_settings_or_without_a_weight_are_tried_apart():
    module = nn.Sequential(*(ScaledRMSNorm(64, eps=1e-5) for _ in range(3)), LlamaRMSNorm(64), LlamaRMSNorm(64))
    module[1].factor = 2.0
    del module[4].weight
    assert use_one_kernel(module, CPU) == 3
    assert ["forward" in vars(norm) for norm in module] == [True, False, True, True, False]


def test_weights_that_are_elsewhere_are_not_read():
    with torch.device("meta"):
        module = nn.Sequential(LlamaRMSNorm(64)).to(torch.bfloat16)
    assert use_one_kernel(module, CPU) == 1
