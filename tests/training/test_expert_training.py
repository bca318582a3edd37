"""Mixtures of experts in training: smoothing, distillation, the monitor, learned exponents and scales reach experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from trainers import make_data, make_trainer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qat import prepare_qat
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.finish import finished_weights
from qat.layers.sites import quantized_sites
from training.start.calibration import calibrate_with_data
from training.start.smoothing import smooth_with_data
from training.teachers.load import load_teacher

CPU = torch.device("cpu")


def make_mixture() -> nn.Module:
    """A tiny Qwen3-MoE whose experts compute under autocast, as a loaded model does."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return compute_in_autocast_dtype(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "scheme,learns", [("MXFP4", "learn_exponent"), ("INT4_G32", "learn_scale"), ("NVFP4", "learn_scale")]
)
def test_experts_learn_from_a_teacher_with_their_scales_and_are_saved_as_they_compute(tmp_path, scheme, learns):
    data, model = make_data(tmp_path), make_mixture()
    teacher = load_teacher(model, None)
    prepare_qat(model, {nn.Linear: scheme}, **{learns: True})
    smooth_with_data(model, data, 0.7, CPU)
    calibrate_with_data(model, data, 4, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, model, data, teacher, bf16=True, max_steps=3, learning_rate=1e-2, log_quantization=True
    )
    trainer.train()
    logs = trainer.state.log_history
    assert all(math.isfinite(entry["kl"]) and entry["kl"] > 0 for entry in logs if "kl" in entry)
    assert any(entry.get("flips/experts", 0) > 0 for entry in logs)
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(f"model.layers.1.mlp.{name}" in moved for name in ("gate.weight", "experts.gate_up_proj"))
    assert sum("experts.projections" in name and name.endswith("_offset") for name in moved) == 4
    sites = {site.tensor: site.module for site in quantized_sites(model) if site.kind == "experts"}
    for name, value in finished_weights(model, after, {}).items():
        if name in sites:
            rounding, offset = sites[name].weight_quantizer.rounding, sites[name].weight_quantizer.learned
            weight = after[name].bfloat16()
            divisors = sites[name].divisors(weight, torch.bfloat16)
            for e in range(4):
                own = None if divisors is None else divisors[e : e + 1]
                rows = rounding.values(weight[e], torch.bfloat16, *(o[e] for o in offset), divisor=own)
                assert torch.equal(value[e], rows.float())


def test_a_mixture_with_its_quantizers_off_is_its_own_teacher_in_evaluation(tmp_path):
    data, model = make_data(tmp_path), make_mixture()
    reference = copy.deepcopy(model)
    prepare_qat(model, {"*.experts": "MXFP4"})
    trainers = (make_trainer(tmp_path, model, data, teacher, bf16=False) for teacher in ("self", reference))
    kl = [trainer.evaluate()["eval_kl"] for trainer in trainers]
    assert kl[0] > 1e-6 and kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert all(site.module.input_quantizer.is_enabled for site in quantized_sites(model))
