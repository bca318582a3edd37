"""Small models whose weights are large enough for distinct answers, in shapes that vLLM's CPU backend accepts."""

from __future__ import annotations

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_COMMON = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.1,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    """A dense model."""
    return _made(LlamaForCausalLM, LlamaConfig(intermediate_size=256, **_COMMON))


def qwen2() -> Qwen2ForCausalLM:
    """A dense model whose q, k and v have biases."""
    return _with_random(_made(Qwen2ForCausalLM, Qwen2Config(intermediate_size=256, **_COMMON)), "bias")


def qwen3_moe() -> Qwen3MoeForCausalLM:
    """Eight experts, two a token."""
    config = Qwen3MoeConfig(
        intermediate_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, **_COMMON,
    )  # fmt: skip
    return _made(Qwen3MoeForCausalLM, config)


def qwen2_moe() -> Qwen2MoeForCausalLM:
    """The same beside a shared expert with a gate of its own."""
    config = Qwen2MoeConfig(
        intermediate_size=256, moe_intermediate_size=128, shared_expert_intermediate_size=128, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, **_COMMON,
    )  # fmt: skip
    return _made(Qwen2MoeForCausalLM, config)


def mixtral() -> MixtralForCausalLM:
    """Four experts, two a token, whose matrices are called w1, w2 and w3 in its files."""
    config = MixtralConfig(intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, **_COMMON)
    return _made(MixtralForCausalLM, config)


def gpt_oss() -> GptOssForCausalLM:
    """Four experts with biases, two a token; attention has sinks and, in every other layer, a window."""
    config = GptOssConfig(
        intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        **_COMMON,
    )  # fmt: skip
    return _with_random(_made(GptOssForCausalLM, config), "bias", "sinks")


def _with_random(model: PreTrainedModel, *endings: str) -> PreTrainedModel:
    """The model, in which parameters whose names have these endings are random in place of zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _made(cls: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(config).bfloat16()


MODELS = {model.__name__: model for model in (llama, qwen2, qwen3_moe, qwen2_moe, mixtral, gpt_oss)}
