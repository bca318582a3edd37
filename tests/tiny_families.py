"""Tiny models of families whose files have other names than their modules, or whose experts are fused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qat.checkpoints import verify_logits
from qat.errors import UserError

_SIZES = {
    "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
_MAMBA = {"chunk_size": 16, "n_groups": 1}
_TEXT = _SIZES | {"head_dim": 32}
_DELTA = {
    "layer_types": ["linear_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 32, "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    },
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 32, "rope_parameters": None},
    "nemotron_h": _MAMBA | {
        "head_dim": 32, "layers_block_type": ["mamba", "moe"], "num_hidden_layers": 2, "ssm_state_size": 16,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_routed_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    },
    "kimi_linear": {"num_experts": 3, "num_experts_per_token": 2, "moe_intermediate_size": 64, "num_hidden_layers": 2},
    "zamba2": _MAMBA | {
        "num_hidden_layers": 3, "layers_block_type": ["hybrid", "mamba", "hybrid"], "num_key_value_heads": 2,
        "attention_head_dim": 64, "mamba_d_state": 16, "mamba_headdim": 32, "n_mamba_heads": 4, "mamba_ngroups": 1,
        "num_mem_blocks": 1, "adapter_rank": 32,
    },
    "mamba2": _MAMBA | {"num_heads": 4, "head_dim": 32, "state_size": 16, "expand": 2},
    "qwen3_5": {
        "text_config": _TEXT | _DELTA,
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 14,
        },
    },
    "gemma3": {
        "text_config": _TEXT, "vision_config": _VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 1, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
    },
}  # fmt: skip
_CLASSES = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}


def make_family(kind: str, **changes) -> PreTrainedModel:
    """A random model, BF16; norms and biases are random too, so that a tensor that is dropped or swapped shows."""
    torch.manual_seed(0)
    sizes = FAMILIES[kind] if kind in _CLASSES else _SIZES | FAMILIES[kind]
    config = AutoConfig.for_model(kind, **(sizes | changes))
    make = getattr(transformers, _CLASSES[kind]) if kind in _CLASSES else AutoModelForCausalLM.from_config
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(torch.bfloat16)


def save_family(kind: str, folder: Path, **changes) -> Path:
    """Its checkpoint, under the names that transformers publishes."""
    make_family(kind, **changes).save_pretrained(folder)
    return folder


def logits_in_this_process(monkeypatch, tmp_path) -> None:
    """A fixture: verification starts no process for logits, but calls the same program."""

    def run(arguments, input_ids):
        inputs, outputs = str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")
        save_file({"input_ids": input_ids}, inputs)
        try:
            verify_logits.main([*arguments, "--inputs", inputs, "--outputs", outputs])
        except UserError as error:
            kind = "NotLoadableError" if arguments[0] == "packed" else "VerificationError"
            raise getattr(verify_logits, kind)(str(error)) from error
        return load_file(outputs)

    monkeypatch.setattr(verify_logits, "_begin", lambda stack, *given: partial(run, *given))
