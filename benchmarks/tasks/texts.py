"""The two out-of-domain texts, and their bits per byte under a model.

text_mixed.txt may be mixed into training; text_never.txt is never trained on and chooses nothing. See fetch.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.tasks.problems import FOLDER
from qat.errors import UserError

TEXTS = ("text_mixed", "text_never")


def read_text(name: str, folder: Path = FOLDER) -> str:
    """One of TEXTS.

    Raises:
        UserError: it was not fetched.
    """
    path = folder / f"{name}.txt"
    if not path.is_file():
        raise UserError(f"{path} is not there; run: python benchmarks/tasks/fetch.py --out {folder}")
    return path.read_text(encoding="utf-8")


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, length: int = 1024, batch_size: int = 8,
    teacher: nn.Module | None = None, limit: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bits per byte of a text in rows of `length` tokens, and with a teacher the KL to it.

    Rows do not see each other, and the first token of each is not predicted: its bytes do not count either.

    Args:
        model: computes in its own dtype.
        limit: rows that are measured; None: all whole ones.

    Returns:
        "bits_per_byte"; its standard error over rows, "error"; "kl" in nats a token, where there is a teacher.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // length * length].reshape(-1, length)[:limit]
    if not len(rows):
        raise UserError(f"the text has {len(ids)} tokens, fewer than a row of {length}; give a smaller length")
    nats, sizes, divergences = [], [], []
    for batch in rows.split(batch_size):
        batch = batch.to(model.device)
        log_p = model(input_ids=batch, use_cache=False).logits[:, :-1]
        target = None if teacher is None else teacher(input_ids=batch, use_cache=False).logits[:, :-1]
        for index, row in enumerate(batch):  # one by one: FP32 logits of a batch are large
            own = log_p[index].float().log_softmax(-1)
            nats.append(-own.gather(-1, row[1:, None]).double().sum().item())
            sizes.append(len(tokenizer.decode(row[1:].tolist()).encode()))
            if target is not None:
                theirs = target[index].float().log_softmax(-1)
                divergences.append((theirs.exp() * (theirs - own)).sum(-1).double().mean().item())
    bits = [nat / math.log(2) for nat in nats]
    mean = sum(bits) / sum(sizes)
    deviation = [bit - mean * size for bit, size in zip(bits, sizes, strict=True)]  # of a ratio, to first order
    error = math.sqrt(sum(d * d for d in deviation)) / sum(sizes) if len(bits) > 1 else math.nan
    figures = {"bits_per_byte": mean, "error": error}
    return figures if teacher is None else figures | {"kl": sum(divergences) / len(divergences)}
