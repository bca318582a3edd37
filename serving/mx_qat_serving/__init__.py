"""A vLLM general plugin: linear kernels for MXFP4 and MXFP8 with the numerics of the training.

vLLM calls `register` in each of its processes. The kernels join its list through `register_linear_kernel`, so vLLM's
own readers of compressed-tensors, AutoRound and Quark checkpoints use them.

    MX_QAT_ACTIVATION_RULE   floor, even, rceil, or none for weight-only; default: even, what transformers applies
    MX_QAT_PLATFORMS         where to offer the kernels, "cpu" by default; "cpu,cuda" puts them before vLLM's own on
                             GPUs, which do not quantize activations on Hopper and Ampere
"""

from __future__ import annotations


def register() -> None:
    """Offer the kernels to vLLM.

    Raises:
        ValueError: a variable of the environment has no meaning.
    """
    from .kernels import register_kernels

    register_kernels()


__all__ = ["register"]
