"""Llamas with random BF16 weights, written shard by shard, and a tokenizer of their vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# name -> hidden, intermediate, layers, heads, key-value heads, size of a head, vocabulary, tied
SHAPES = {
    "tiny": (256, 768, 4, 4, 2, 64, 2048, True),
    "0.1b": (576, 1536, 30, 9, 3, 64, 49152, True),
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
SHARD_BYTES = 5 * 10**9
_POOL_VALUES = 16 * 10**6


def config_of(shape: str) -> LlamaConfig:
    """The configuration of a shape."""
    hidden, intermediate, layers, heads, kv_heads, head, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip


def write_model(shape: str, folder: Path) -> int:
    """Write a checkpoint with random BF16 weights and a tokenizer; returns the number of parameters.

    Weights are parts of one random tensor, so that writing takes the time of copying.
    """
    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pool = torch.empty(_POOL_VALUES, dtype=torch.bfloat16).normal_(0, 0.02)
    shards: list[dict[str, torch.Tensor]] = [{}]
    written, index = 0, {}
    folder.mkdir(parents=True)

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[-1], name))
        shards[-1].clear()

    for number, (name, parameter) in enumerate(model.named_parameters()):
        if sum(t.nbytes for t in shards[-1].values()) + 2 * parameter.numel() > SHARD_BYTES and shards[-1]:
            flush()
            shards.append({})
        shards[-1][name] = _values(parameter, pool, 7919 * number)
        written += parameter.numel()
    flush()
    text = json.dumps({"metadata": {"total_size": 2 * written}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return written


def _values(parameter: torch.Tensor, pool: torch.Tensor, offset: int) -> torch.Tensor:
    if parameter.ndim == 1:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    rolled = pool.roll(offset)
    return rolled.repeat(-(-parameter.numel() // len(pool)))[: parameter.numel()].view(parameter.shape)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of `size` tokens: bytes, pairs of bytes, pairs of those and bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    merges: list[tuple[str, str]] = []
    left = letters
    while len(vocabulary) < size:
        made = [(a, b) for a in left for b in letters if a + b not in vocabulary][: size - len(vocabulary)]
        vocabulary.update({a + b: len(vocabulary) + i for i, (a, b) in enumerate(made)})
        merges += made
        left = [a + b for a, b in made]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
