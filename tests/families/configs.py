"""Tiny configurations of transformers' model families: 2 layers, 64 hidden units, the vocabulary of the byte tokenizer.

`SMALL` says how large a field may be, whatever family has it; `OVERRIDES` has what one family needs beside that. Every
dimension that a real model has in multiples of 32 is one of 32 here, so that the blocks of its formats divide it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .entries import model_type

VOCABULARY = 260  # of helpers.make_tokenizer, and some that no token uses
LENGTH = 256

_VALUES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    0: "bos_token_id",
    2: "pad_token_id n_layer n_layers num_layers num_hidden_layers encoder_layers decoder_layers num_encoder_layers "
       "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
       "linear_num_key_heads swa_num_key_value_heads num_query_groups hc_count "
       "hc_mult num_layers_per_stack max_window_layers no_rope_layer_interval sliding_window_pattern",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
       "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
       "num_experts n_routed_experts num_local_experts moe_num_experts "
       "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads index_n_heads",
    16: "head_dim v_head_dim qk_nope_head_dim swa_head_dim dim_head attention_head_size chunk_size mamba_chunk_size "
        "mamba_d_state state_size ssm_state_size linear_key_head_dim linear_value_head_dim d_head "
        "query_pre_attn_scalar kv_channels",
    8: "qk_rope_head_dim",
    24: "qk_head_dim",
    32: "linear_head_dim kv_lora_rank q_lora_rank o_lora_rank laurel_rank adapter_rank mamba_d_head mamba_headdim "
        "mamba_head_dim time_step_rank mamba_dt_rank hidden_size_per_layer_input d_rel hc_lowrank index_head_dim",
    64: "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim lru_width "
        "attention_hidden_size attention_chunk_size sliding_window sliding_window_size local_attention "
        "attention_window_size window_size moe_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size index_topk "
        "shared_intermediate_size dim_model_base router_hidden_size hidden_size_global",
    128: "intermediate_size intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size d_inner dff "
         "dim_ff dense_intermediate_size feed_forward_size mamba_d_ssm n_inner",
    LENGTH: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
            "original_max_position_embeddings max_source_positions model_max_length",
    1: "eos_token_id n_group n_groups topk_group mamba_n_groups n_shared_experts first_k_dense_replace "
       "decoder_start_token_id sep_token_id num_expert_group o_groups",
}  # fmt: skip
SMALL = {field: value for value, fields in _VALUES.items() for field in fields.split()}

# Of vision and audio towers, beside SMALL.
TOWER = dict(  # noqa: C408
    depth=2, num_heads=4, num_key_value_heads=4, image_size=32, patch_size=16, out_hidden_size=64, mlp_dim=128,
    projector_input_dim=64, projector_output_dim=64, vision_output_dim=64, num_position_embeddings=16,
    deepstack_visual_indexes=[0], num_blocks=2, ext_pw_out_channel=64, depthwise_separable_out_channel=64,
    nemo_conv_channels=64, output_channels=32, crop_size=32, adapter_in_dim=64, adapter_out_dim=64,
    adapter_input_size=64, downsample_hidden_size=32, num_codebooks=2, global_attn_indexes=[1], feature_size=16,
    base_channels=32, codebook_size=64,
)  # fmt: skip
_TOKEN = 259  # one that no text has
TOKENS = {
    f"{kind}_token_{what}": _TOKEN
    for what in ("id", "index")
    for kind in ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision_start", "vision_end")
}

# What a family needs beside SMALL. "text_config" and "vision_config" hold what those parts need.
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA3N = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_QWEN4 = {
    "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 300, "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32,
    "indexer_budget": 64, "indexer_compress_ratio": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3},
    "emu3": {
        "vocabulary_map": {"<image>": 259, "<|extra_200|>": 258},
        "vq_config": {"channel_multiplier": [1, 1], "attn_resolutions": [1]},
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _LINEAR_AND_FULL,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2, "head_dim": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "phi4": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_embed_dim": 32, "shape_vocab_size": 300},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED | {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": _SHARED,
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(entry: str) -> PretrainedConfig:
    """The tiny configuration of an entry."""
    kind = model_type(entry)
    return AutoConfig.for_model(kind, **_arguments(CONFIG_MAPPING[kind], OVERRIDES.get(entry, {})))


def _arguments(cls: type[PretrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    fields = _fields(cls)
    found = {name: value for name, value in (SMALL | TOKENS).items() if name in fields}
    if "qk_rope_head_dim" in fields:
        found.pop("head_dim", None)  # where attention is latent, the size of the rotary part, or derived
        found |= {name: 4 for name in ("num_key_value_heads",) if name in found}  # every head has its own
    for part in getattr(cls, "sub_configs", None) or {}:
        sub = getattr(cls(), part, None)
        if sub is not None:
            found[part] = {"model_type": sub.model_type} | _arguments(type(sub), {})
            found[part] |= (
                {} if part.startswith("text") else {n: v for n, v in TOWER.items() if n in _fields(type(sub))}
            )
    found |= _layers(cls, fields)
    for name, value in own.items():
        found[name] = found[name] | value if isinstance(found.get(name), dict) and isinstance(value, dict) else value
    return found


def _layers(cls: type[PretrainedConfig], fields: set[str]) -> dict[str, Any]:
    """One layer of each kind that the family's default configuration has, in its order, and at least 2 layers."""
    try:
        default = cls()
    except (ValueError, TypeError):
        return {}
    count = getattr(default, "num_hidden_layers", None)
    lists = {name: value for name, value in vars(default).items() if _names_kinds(value, count) and name in fields}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))[:4]
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    if not kinds:
        return {}
    columns = zip(*kinds, strict=True)
    return {"num_hidden_layers": len(kinds)} | {n: list(column) for n, column in zip(lists, columns, strict=True)}


def _names_kinds(value: object, layers: int | None) -> bool:
    return isinstance(value, list) and len(value) == layers and all(isinstance(kind, str) for kind in value)


def _fields(cls: type[PretrainedConfig]) -> set[str]:
    names = set(getattr(cls, "__dataclass_fields__", ())) | set(getattr(cls, "attribute_map", ()))
    return names
