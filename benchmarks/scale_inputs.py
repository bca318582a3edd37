"""What runs at scale read: models of published shapes with random weights, a tokenizer of words, random words.

Nothing is initialized by transformers: each shard's tensors are drawn on the GPU if there is one, and written in BF16.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qat.errors import UserError

SHARD_BYTES = 4e9
SPECIAL = ("<s>", "</s>")
ATTENTIONS = ("sdpa", "flex_attention")
TURN_ENDS = (
    3  # tokens of a conversation that are not its answer: one of the question, and what texts begin and end with
)
_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
_QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "vocab_size": 151936, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
_SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "head_dim": 32}


@dataclass(frozen=True)
class Shape:
    """A kind of model of transformers and the values of its configuration."""

    kind: str
    values: dict = field(default_factory=dict)

    def config(self, layers: int = 0, vocabulary: int = 0):
        """Its configuration; with `layers` and `vocabulary` in place of its own where they are not 0."""
        changes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
        common = {
            "tie_word_embeddings": False, "max_position_embeddings": 32768, "bos_token_id": 0, "eos_token_id": 1,
            "architectures": [{"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[self.kind]],
            "dtype": "bfloat16",
        }  # fmt: skip
        values = {**common, **self.values, **{name: value for name, value in changes.items() if value}}
        return AutoConfig.for_model(self.kind, **values)


SHAPES = {
    "8b": Shape("llama", _LLAMA_8B),
    "30b-a3b": Shape("qwen3_moe", _QWEN3_30B_A3B),
    "tiny": Shape("llama", {**_SMALL, "intermediate_size": 96, "num_hidden_layers": 2}),
    "tiny-moe": Shape(
        "qwen3_moe",
        {**_SMALL, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 2, "num_experts": 4,
         "num_experts_per_tok": 2},
    ),
}  # fmt: skip


def skeleton(config) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a published checkpoint: stacked experts are stored one by one."""
    for name, parameter in model.state_dict().items():
        if ".experts." not in name:
            yield name, tuple(parameter.shape)
            continue
        prefix, _, matrix = name.rpartition(".")
        experts, rows, columns = parameter.shape
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrix]
        for expert in range(experts):
            for part in parts:
                yield f"{prefix}.{expert}.{part}.weight", (rows // len(parts), columns)


def write_model(folder: Path, config, device: str = "cpu") -> Path:
    """Write random BF16 weights of `config` with a tokenizer into `folder`, which appears once it is whole.

    Matrices are normal with standard deviation 0.02, norms are 1.
    """
    whole, folder = folder, folder.with_name(f".{folder.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    names, shard, held, total, index = [], {}, 0, 0, {}

    def flush() -> None:
        names.append(f"model-{len(names) + 1:05d}.safetensors")
        save_file(shard, folder / names[-1], metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, names[-1]))
        shard.clear()

    for name, shape in stored_tensors(skeleton(config)):
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:
            tensor.normal_(0, 0.02, generator=generator)
        shard[name] = tensor.cpu()
        held, total = held + tensor.nbytes, total + tensor.nbytes
        if held >= SHARD_BYTES:
            flush()
            held = 0
    if shard:
        flush()
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder.rename(whole)


def check_same(folder: Path, config) -> None:
    """Raise a UserError if the model in `folder` has other whole numbers in its config.json than `config`."""
    there = json.loads((folder / "config.json").read_text())
    for name, value in config.to_dict().items():
        if isinstance(value, int) and there.get(name, value) != value:
            raise UserError(f"--work: {folder} holds a model with {name} {there[name]}, not {value}; name a new folder")


def with_attention(model: Path, attention: str) -> Path:
    """A folder of the same files, hard links, whose config.json names another attention of transformers."""
    folder = model.with_name(f"{model.name}-{attention}")
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.name != "config.json":
            (folder / path.name).unlink(missing_ok=True)
            os.link(path, folder / path.name)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": attention}, indent=2))
    return folder


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, ... that are the tokens 2, 3, ...; one that is not known is the end of a text."""
    words = {**{name: i for i, name in enumerate(SPECIAL)}, **{f"w{i}": i for i in range(len(SPECIAL), vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def write_data(path: Path, vocabulary: int, rows: int, tokens: int, samples: int = 1) -> Path:
    """Conversations of random words; `samples` of them fill a row of `tokens`."""
    draw = random.Random(0)
    words = tokens // samples - TURN_ENDS
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows * samples):
            text = " ".join(f"w{draw.randrange(len(SPECIAL), vocabulary)}" for _ in range(words))
            turns = [{"from": "User", "value": "w2"}, {"from": "Assistant", "value": text}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path
