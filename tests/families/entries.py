"""The families of the sweep, generated from transformers' own tables, and what is expected of each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

PROVEN, WEIGHTS_PROVEN, REFUSED, FAILED, NOT_BUILT = "proven", "weights proven", "refused", "failed", "not built"

# Families as they were surveyed first. The goal counts these; "phi4" is phi3 with partial rotary embeddings.
SURVEYED = list(
    filter(
        None,
        re.split(
            r"\s+",
            """
llama qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text gemma4_text mistral ministral ministral3 phi phi3 phi4 gpt2
gpt_neox gptj gpt_bigcode opt falcon bloom mpt stablelm starcoder2 olmo2 olmo3 granite cohere cohere2 smollm3 glm4
ernie4_5 exaone4 seed_oss nemotron hunyuan_v1_dense apertus arcee helium bitnet minicpm3 modernbert-decoder
qwen3_5_text qwen3_next mamba mamba2 falcon_mamba falcon_h1 bamba zamba2 jamba lfm2 recurrent_gemma granitemoehybrid
nemotron_h kimi_linear
mixtral qwen2_moe qwen3_moe qwen3_5_moe_text gpt_oss deepseek_v2 deepseek_v3 glm4_moe olmoe granitemoe llama4_text
minimax minimax_m2 ernie4_5_moe phimoe lfm2_moe dbrx
gemma3 gemma4 qwen3_5 llama4 qwen3_vl mistral3
""",
        ),
    )
)

VARIANTS = {"phi4": "phi3"}  # an entry that is no model_type: the one that it has
BESIDE = ("qwen3_vl", "mistral3")  # no causal language models for transformers, but published as such


@dataclass(frozen=True)
class Expected:
    """The outcome that an entry has instead of PROVEN, and a pattern of the message that says why."""

    outcome: str
    pattern: str
    reason: str


def entries() -> list[str]:
    """Every entry by name: the causal families of transformers, variants, and vision-language folders."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS, *BESIDE]))


def model_type(entry: str) -> str:
    """The `model_type` of an entry's configuration."""
    return VARIANTS.get(entry, entry)


def has_vision(entry: str) -> bool:
    """Whether its folder is published as a vision-language model."""
    return entry in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
