"""Write a tiny Llama as a GGUF file, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter
from transformers import LlamaForCausalLM

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Write `model` in F32 and return the weights that a reader must find, by their Hugging Face names."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    weights = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    for i in range(config.num_hidden_layers):
        weights |= {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}" for ours, theirs in _NAMES.items()}
    state = model.state_dict()
    for ours, theirs in weights.items():
        tensor = state[ours]
        if theirs.endswith(("attn_q", "attn_k")):  # llama.cpp interleaves the halves that rotate together
            heads = config.num_attention_heads if theirs.endswith("q") else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: state[name] for name in weights}
