"""A vLLM general plugin: linear kernels and experts with the numerics of the training.

vLLM calls `register` in each of its processes. Kernels for MXFP4, MXFP8 and NVFP4 weights join its list through
`register_linear_kernel`, so vLLM's own readers of compressed-tensors, AutoRound and Quark checkpoints use them. Experts
in all formats are served from compressed-tensors' checkpoints, and gpt-oss from its own. Inputs are quantized as the
checkpoint says: in MXFP4, MXFP8, FP8 (a scale a token or 128 values), NVFP4, or not at all.

    MX_QAT_ACTIVATION_RULE   rules separated by commas: floor, even or rceil for MX activations, absmax or absmax_native
                             for FP8 and NVFP4; or none for weights only. Default: even, absmax
    MX_QAT_PLATFORMS         where to offer the kernels, "cpu" by default; "cpu,cuda" puts them before vLLM's own on
                             GPUs, which do not quantize activations on Hopper and Ampere
"""

from __future__ import annotations


def register() -> None:
    """Offer the kernels to vLLM.

    Raises:
        ValueError: a variable of the environment has no meaning.
    """
    from .registration import register_all

    register_all()


__all__ = ["register"]
