"""In each family of models all activations are smoothed that can be, the others are named, and the function stays."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat import prepare_qat
from qat.layers.sites import quantized_sites, quantizers_off
from qat.transforms.smoothing import smooth

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **EXPERTS,
}  # fmt: skip
HEADS = {"head_dim": 16}
IDS = torch.randint(3, 128, (1, 48), generator=torch.Generator().manual_seed(1))

# Fields beside SIZES; smoothed of all inputs of quantized layers; what is left because it would move the logits.
FAMILIES = {
    "deepseek_v2": (LATENT, (11, 13), []),  # the router and the experts read what the shared experts read
    "deepseek_v3": (LATENT, (11, 13), []),
    "glm4_moe": ({**EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, (9, 9), []),
    "granitemoehybrid": (
        {"layer_types": ["attention", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
         "shared_intermediate_size": 32}, (8, 10), []),
    "nemotron_h": (
        {"layers_block_type": ["moe", "attention", "mlp"], "moe_shared_expert_intermediate_size": 32, **HEADS,
         **EXPERTS},
        (4, 7), []),  # ReLU squared between up_proj and down_proj
    "arcee": ({}, (6, 8), []),
    "apertus": ({}, (6, 8), []),
    "nemotron": ({}, (6, 8), []),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2}, (4, 8), []),
    "bitnet": ({}, (8, 8), []),  # norms between the pairs
    "gemma4_text": (
        {**HEADS, "global_head_dim": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 128},
        (6, 13), ["self_attn.v_proj"]),
    "gemma3n_text": (
        {**HEADS, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 128, "laurel_rank": 32,
         "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0]},
        (4, 16), ["input_layernorm", "self_attn.v_proj"]),
    "minimax": (
        {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], **HEADS}, (3, 8),
        ["input_layernorm", "post_attention_layernorm"]),
    "modernbert-decoder": (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, (2, 5), ["model.embeddings.norm"]),
    "mamba": ({"state_size": 16, "time_step_rank": 32}, (2, 6), []),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **HEADS}, (8, 8), []),
    "mixtral": ({"num_local_experts": 4}, (8, 8), []),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS}, (6, 8), []),  # (up + 1) * glu
    "llama4_text": ({"num_local_experts": 4, "intermediate_size_mlp": 96, **HEADS}, (12, 12), []),
    "phi3": ({}, (4, 8), []),  # q, k, v and gate, up are one matrix each
}  # fmt: skip


def make(kind: str) -> torch.nn.Module:
    """A model whose norms, biases and experts are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | FAMILIES[kind][0])).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.rand_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_activations_are_smoothed_but_those_that_move_the_logits(kind):
    _, (smoothed, inputs), left = FAMILIES[kind]
    model = make(kind)
    expected = model(IDS).logits
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ignore=unquantized(model))
    norms = {name: value.clone() for name, value in model.named_parameters() if value.ndim == 1}
    result = smooth(model, [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}], 0.7)
    assert (result.smoothed, result.inputs) == (smoothed, inputs)
    assert sorted({name.split("layers.")[-1].lstrip("01.") for name in result.left}) == sorted(left)
    untouched = [f"{name}.weight" for name in result.left if f"{name}.weight" in norms]
    assert all(torch.equal(model.get_parameter(name), norms[name]) for name in untouched)
    with quantizers_off(model):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def unquantized(model) -> list[str]:
    """The output head, whatever its name, and layers whose width no block divides."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return [n for n, m in linear.items() if m is model.get_output_embeddings() or m.in_features % 32]


def test_the_router_and_all_experts_are_multiplied_by_what_the_norm_is_divided_by():
    model = prepare_qat(make("qwen3_moe"), {torch.nn.Linear: "MXFP4"})
    norm, moe = model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp
    before = [value.clone() for value in (norm.weight, moe.gate.weight, moe.experts.gate_up_proj)]
    smooth(model, [{"input_ids": IDS}], 0.7)
    factors = before[0] / norm.weight
    assert factors.std() > 0.05
    torch.testing.assert_close(moe.gate.weight, before[1] * factors)
    gate, own_gate = (weight[:, :32] for weight in (moe.experts.gate_up_proj, before[2]))
    torch.testing.assert_close(gate, own_gate * factors)


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])  # [E, 2I, H]; [E, H, 2I]
def test_alpha_one_makes_the_channels_within_each_expert_equally_large(kind):
    model = prepare_qat(make(kind), {torch.nn.Linear: "MXFP8"})
    smooth(model, [{"input_ids": IDS}], 1.0)
    seen = []
    down = next(site.module for site in quantized_sites(model) if site.parameter == "down_proj")
    down.register_forward_pre_hook(lambda module, args: seen.append(args))
    with quantizers_off(model):
        model(IDS)
    (x, routing), *_ = seen
    for expert in range(4):
        largest = x[routing.experts == expert].abs().amax(0)
        torch.testing.assert_close(largest, largest.mean().expand_as(largest), rtol=1e-3, atol=0)


def test_an_expert_that_no_token_reaches_stays_as_it_is():
    model = prepare_qat(make("mixtral"), {torch.nn.Linear: "MXFP4"})
    experts = model.model.layers[0].mlp.experts
    own = experts.down_proj.clone()
    smooth(model, [{"input_ids": IDS[:, :1]}], 0.7)  # one token reaches two of the four
    smoothed = [not torch.equal(new, old) for new, old in zip(experts.down_proj, own, strict=True)]
    assert sum(smoothed) == 2
