"""What is expected of an entry, where that is not a proven packed folder with equal logits."""

from __future__ import annotations

from .entries import FAILED, NOT_BUILT, WEIGHTS_PROVEN, Expected

_INIT = Expected(
    WEIGHTS_PROVEN, "_init_weights in modeling_.* reads the weight",
    "transformers initializes packed layers by a weight that they do not have; vLLM does not",
)  # fmt: skip
_FUSED = Expected(
    WEIGHTS_PROVEN, "from fused tensors only",
    "transformers reads these experts from fused tensors only; vLLM reads one by one",
)  # fmt: skip

EXPECTED: dict[str, Expected] = {
    **dict.fromkeys(
        ("gpt_bigcode", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "modernbert-decoder", "nanochat"), _INIT
    ),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _FUSED),
    "zamba2": Expected(WEIGHTS_PROVEN, "shares its weight", "transformers ties no packed weights"),
    "kimi_linear": Expected(
        WEIGHTS_PROVEN, "CompressedTensorsDequantize drops", "transformers drops what is not packed in these layers"
    ),
    "dbrx": Expected(
        FAILED, "index_add_", "transformers' own code fails under BF16 autocast; nothing can be trained in BF16"
    ),
    "gemma3n": Expected(NOT_BUILT, "timm", "its vision tower needs the timm library"),
}  # fmt: skip
