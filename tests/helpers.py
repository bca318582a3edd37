"""Small parts that tests share: a tiny Llama, its tokenizer, a few conversations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qat import prepare_qat

ROOT = Path(__file__).parent.parent
MIXED = {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones; ids 0 to 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_llama(tie_word_embeddings: bool = True, attention_bias: bool = False, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of 64 hidden units whose layers all fit MX blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tie_word_embeddings,
        attention_bias=attention_bias, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_mixture(
    kind: str = "qwen3_moe", experts: int = 4, layers: int = 2, chosen: int = 2, **kwargs
) -> PreTrainedModel:
    """A random mixture of experts of 64 hidden units: "qwen3_moe", "gpt_oss" or another kind; `chosen` for each token.

    Biases are random too, so that a lost one shows.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=260, hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256, num_experts=experts,
        num_local_experts=experts, num_experts_per_tok=chosen, bos_token_id=0, eos_token_id=1, pad_token_id=1, **kwargs,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **kwargs) -> Path:
    """A checkpoint with tokenizer, as a user has it on disk."""
    make_llama(**kwargs).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_qat(folder: Path, mapping: dict[str, str], input_transforms: dict[str, str] | None = None, **kwargs) -> Path:
    """A tiny QAT checkpoint, as a run leaves it."""
    model = prepare_qat(make_llama(**kwargs).bfloat16(), mapping, input_transforms=input_transforms)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder


def write_conversations(path: Path, count: int = 40) -> Path:
    """`count` short conversations in Daring-Anteater's schema."""
    rows = (
        {
            "conversations": [
                {"from": "User", "value": f"What is {i} plus {i}?"},
                {"from": "Assistant", "value": f"It is {2 * i}."},
            ]
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.seen |= {tuple(t.shape) for t in results if isinstance(t, torch.Tensor)}
        return result
