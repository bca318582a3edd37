"""What is expected of an entry, where that is not a proven packed folder with equal logits."""

from __future__ import annotations

from .entries import NOT_BUILT, REFUSED, WEIGHTS_PROVEN, Expected

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
        (
            "gpt_bigcode", "falcon", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "modernbert-decoder",
            "nanochat",
        ),
        _INIT,
    ),
    "gpt2": Expected(
        WEIGHTS_PROVEN, "is a Conv1D there", "transformers reads packed weights of torch.nn.Linear only; vLLM also these"
    ),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _FUSED),
    "zamba2": Expected(WEIGHTS_PROVEN, "shares its weight", "transformers ties no packed weights"),
    "kimi_linear": Expected(
        WEIGHTS_PROVEN, "CompressedTensorsDequantize drops", "transformers drops what is not packed in these layers"
    ),
    "dbrx": Expected(
        REFUSED, "does not run under autocast", "transformers' own code fails under BF16 autocast; `--bf16 False` trains"
    ),
    "gemma3n": Expected(NOT_BUILT, "timm", "its vision tower needs the timm library"),
}  # fmt: skip
