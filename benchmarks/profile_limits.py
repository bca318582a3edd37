"""What the parts of a training step must move at least, and the products' operations, from the shape of a Llama.

A part is what `profile_step.py` calls a category. The bytes are those of the part as it is defined (an RMSNorm in FP32
reads its input once and writes its output once), not of the kernels that compute it today: a kernel more is a pass
more. What is read by one part and was written by another counts for both, so a compiled graph, which joins parts, may
take less than the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

FP32, BF16, E4M3 = 4, 2, 1
MASTERS_AND_MOMENTS = 3  # tensors of a parameter that AdamW reads and writes; the gradient it only reads


@dataclass(frozen=True)
class Sizes:
    """A step's sizes: tokens and numbers of parameters.

    Args:
        rounds_weights: whether weights are rounded to a format.
        code_bits: of a quantized input's code, scale included; 0 where inputs are not quantized.
        recomputed: whether a block's forward pass runs again in the backward pass.
        teacher: whether a second forward pass and its head are computed, in BF16.
        in_fp8: whether the forward products take E4M3 values, of weights and inputs, and not rounded BF16.
    """

    config: LlamaConfig
    rows: int
    length: int
    rounds_weights: bool = False
    code_bits: float = 0.0
    recomputed: bool = False
    teacher: bool = False
    in_fp8: bool = False

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.rows * self.length

    @property
    def widths(self) -> dict[str, int]:
        """hidden, intermediate, and outputs of q_proj and k_proj together with v_proj, and the vocabulary."""
        c = self.config
        head = c.head_dim or c.hidden_size // c.num_attention_heads
        return {
            "hidden": c.hidden_size, "intermediate": c.intermediate_size, "q": c.num_attention_heads * head,
            "kv": 2 * c.num_key_value_heads * head, "vocabulary": c.vocab_size,
        }  # fmt: skip

    @property
    def block_weights(self) -> int:
        """Parameters of the linear layers of all blocks."""
        w = self.widths
        attention = w["hidden"] * (w["q"] + w["kv"]) + w["q"] * w["hidden"]
        return self.config.num_hidden_layers * (attention + 3 * w["hidden"] * w["intermediate"])

    @property
    def head_weights(self) -> int:
        """Parameters of the output embedding."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """All of them."""
        norms = (2 * self.config.num_hidden_layers + 1) * self.config.hidden_size
        embeddings = self.head_weights * (1 if self.config.tie_word_embeddings else 2)
        return self.block_weights + embeddings + norms

    @property
    def inputs(self) -> int:
        """Values that the linear layers of a block take, an input of several layers once; of all blocks."""
        w = self.widths
        of_a_block = w["hidden"] + w["q"] + w["hidden"] + w["intermediate"]
        return self.config.num_hidden_layers * of_a_block * self.tokens

    @property
    def passes(self) -> int:
        """How often the blocks run forward: once more where they are recomputed, once more for a teacher."""
        return 1 + self.recomputed + self.teacher


def least_bytes(s: Sizes) -> dict[str, float]:
    """Category -> bytes that a step must read and write in it."""
    w, tokens, layers = s.widths, s.tokens, s.config.num_hidden_layers
    stream = tokens * w["hidden"] * FP32  # the residual stream once
    normed = tokens * w["hidden"] * 2 * layers  # values that the norms of blocks give to linear layers
    forward_norms = s.passes * 2 * layers + 1 + s.teacher
    cast_weights = s.head_weights + (0 if s.rounds_weights else s.block_weights * (1 + s.recomputed))
    cast_inputs = 1 + s.teacher + (0 if s.code_bits else 1 + s.recomputed)  # gradients, teacher, the step's own
    result = {
        # FP32 in and out; backward reads input and gradient and writes a gradient
        "norms": stream * (2 * forward_norms + 3 * (2 * layers + 1)),
        # q and k are read and written; the same of their gradients
        "rope": tokens * (w["q"] + w["kv"] / 2) * 2 * BF16 * layers * (s.passes + 1),
        # gate, up -> product; gate, up, gradient -> two gradients
        "silu * up": tokens * w["intermediate"] * BF16 * layers * (3 * s.passes + 5),
        # stream, output of a linear layer -> stream; two gradients of the stream -> one
        "residual adds": layers * 2 * (s.passes * (2 * stream + stream / 2) + 3 * stream),
        # masters to BF16 where a product takes them so, and their gradients back to FP32 (products of quantized layers
        # write FP32), the output of norms to BF16 and its gradient back
        "casts and copies": cast_weights * (FP32 + BF16)
        + (0 if s.rounds_weights else s.block_weights * (BF16 + FP32))
        + normed * (FP32 + BF16) * cast_inputs,
        # logits are read once, their gradient is written once, the head's gradient is written in FP32
        "loss": tokens * w["vocabulary"] * BF16 * (2 + s.teacher) + s.head_weights * FP32,
        "optimizer": s.parameters * FP32 * (2 * MASTERS_AND_MOMENTS + 1),
        "embedding": 2 * stream + s.head_weights * FP32,  # backward writes a whole gradient
    }
    # A forward pass reads what it rounds and writes values for the product; a value costs a byte in E4M3, and a row of
    # them a scale, which is not counted.
    given, repeats = E4M3 if s.in_fp8 else BF16, 1 + s.recomputed
    if s.rounds_weights:  # from the master again in the backward pass, to BF16
        result["rounding"] = s.block_weights * ((FP32 + given) * repeats + FP32 + BF16)
    if s.code_bits:  # codes are written forward, read backward, and become BF16
        forward, code = s.inputs * (BF16 + given) + normed * (FP32 - BF16), s.code_bits / 8
        result["rounding"] += forward * repeats + s.inputs * (2 * code + BF16)
    return result


def operations(s: Sizes) -> dict[str, float]:
    """Category -> floating-point operations of a step's products."""
    blocks, head = (2.0 * s.tokens * n for n in (s.block_weights, s.head_weights))
    causal = 2.0 * s.tokens * s.length * s.widths["q"] * s.config.num_hidden_layers  # half of QK^T and of PV
    return {
        "products, forward": blocks * s.passes,
        "products, backward input": blocks,
        "products, backward weight": blocks,
        "products, head": head * (3 + s.teacher),
        "attention": causal * (s.passes + 2.5),
    }


def fp8_operations(s: Sizes) -> float:
    """Operations among those of "products, forward" that take E4M3 values: not the teacher's."""
    return 2.0 * s.tokens * s.block_weights * (1 + s.recomputed) * s.in_fp8
