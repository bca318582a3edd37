"""A tiny gpt-oss, in BF16 and as OpenAI publishes it: experts in MXFP4, packed here without code of the product."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers import make_mixture, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
NATIVE = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def make_gpt_oss(layers: int = 2) -> PreTrainedModel:
    """A random gpt-oss of 64 hidden units and 4 experts in BF16; its biases are not zero."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return make_mixture(
        "gpt_oss", layers=layers, rope_parameters=rope, tie_word_embeddings=False, sliding_window=64
    ).bfloat16()


def save_gpt_oss(folder: Path, **kwargs) -> Path:
    """A checkpoint in BF16 with a tokenizer."""
    make_gpt_oss(**kwargs).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_published(folder: Path, **kwargs) -> Path:
    """The same as OpenAI's folders are: `_blocks` and `_scales` of experts, random ones, beside BF16 tensors."""
    save_gpt_oss(folder, **kwargs)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(119, 123, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": NATIVE}))
    return folder


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published folder by the names of the model's, FP4 codes and scales as BF16 values.

    A weight [E, K, N] holds at [e, k, n] the code of nibble k % 2 (low first) of byte k // 2 of row n.
    """
    stored = load_file(folder / "model.safetensors")
    values = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in [name for name in stored if name.endswith("_blocks")]:
        blocks, scales = stored[name], stored[name.replace("_blocks", "_scales")]
        codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
        rows = (E2M1[codes.int()] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)
        values[name.removesuffix("_blocks")] = rows.transpose(1, 2).contiguous().bfloat16()
    return values
