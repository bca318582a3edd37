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

_CONV1D = Expected(
    WEIGHTS_PROVEN, "is a Conv1D there", "transformers reads packed weights of torch.nn.Linear only; vLLM also these"
)
_DROPPED = Expected(
    WEIGHTS_PROVEN, "CompressedTensorsDequantize drops", "transformers drops what is not packed in these layers"
)
_TIED = Expected(WEIGHTS_PROVEN, "shares its weight", "transformers ties no packed weights")
_AUTOCAST = Expected(
    REFUSED,
    "does not run under autocast",
    "transformers' own code fails under BF16 autocast; `--bf16 False --distill False` trains",
)
_BF16 = Expected(
    REFUSED, "mixed dtype|expected scalar type Float", "in transformers' code, BF16 layers get values in FP32 and fail"
)
_INSIDE = Expected(
    REFUSED, "could not load it again", "transformers has no AutoModelForCausalLM for the language model inside"
)
_DRAFT = Expected(
    NOT_BUILT, "must be 0|layer types producing a cache", "a draft model, which needs the keys and values of another"
)
_COMPOSITE = Expected(
    NOT_BUILT, "has no attribute 'dropout'", "AutoModelForCausalLM gives the decoder the configuration of the whole"
)
_GROUPS: dict[str, Expected] = {
    "gpt_bigcode falcon mamba mamba2 falcon_mamba recurrent_gemma modernbert-decoder nanochat blt phi4_multimodal rwkv":
        _INIT,
    "granitemoe granitemoehybrid granitemoe_swa granitemoeshared aria_text hy_v4 inkling_text minimax_m3_vl_text zaya":
        _FUSED,
    "gpt2 gpt-sw3 openai-gpt": _CONV1D,
    "kimi_linear bailing_hybrid olmo_hybrid longcat_flash": _DROPPED,
    "zamba zamba2": _TIED,
    "dbrx xlstm xmod": _AUTOCAST,
    "emu3 mllama": _INSIDE,
    "ctrl xglm xlnet": _BF16,
    "gemma4_assistant gemma4_unified_assistant": _DRAFT,
    "musicgen musicgen_melody": _COMPOSITE,
}  # fmt: skip

EXPECTED: dict[str, Expected] = {
    **{entry: expected for entries, expected in _GROUPS.items() for entry in entries.split()},
    "gemma3n": Expected(NOT_BUILT, "timm", "its vision tower needs the timm library"),
    "hrm_text": Expected(
        REFUSED,
        "has no tensor .*q_proj",
        "its files keep queries, keys, values and gates in one tensor, also when saved",
    ),
    "inkling2_text": Expected(
        REFUSED, "in another form than the model has it", "its files keep experts in another layout than transformers"
    ),
    "prophetnet": Expected(
        REFUSED,
        "the logits of transformers, .* differ",
        "transformers rounds once more where an input is not contiguous",
    ),
}
