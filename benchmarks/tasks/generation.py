"""Answers to questions in the model's chat template, greedy or sampled, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

PROMPT_TOKENS = 131_072  # of a batch, padded


def as_chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text of a one-turn conversation up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int,
    batch_size: int,
) -> list[str]:  # fmt: skip
    """The texts of `generate`."""
    return [text for text, _ in generate(model, tokenizer, questions, max_new_tokens, batch_size)]


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int,
    batch_size: int, seed: int | None = None,
) -> list[tuple[str, bool]]:  # fmt: skip
    """Answers and whether they have ended, in the order of the questions; the longest are answered first.

    They are greedy; with a seed they are sampled, at temperature 1 from the likeliest tokens that have 95 % together.

    The model computes in its own dtype, as in lm_eval: give one in BF16. A batch is padded on the left to its longest
    question and runs until all its answers have ended. Memory for keys and values limits `batch_size`: 29 KB a token
    for Qwen2.5-Coder-1.5B, or 13 GB for 640 answers of 700 tokens. A batch has at most PROMPT_TOKENS of questions: a
    layer computes all of them at once, in four tensors of 18 KB a token for that model.
    """
    texts = [as_chat(tokenizer, question) for question in questions]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda index: -lengths[index])
    ends = _ends(model, tokenizer)
    sampling = (
        {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    )
    config = GenerationConfig(
        **sampling, max_new_tokens=max_new_tokens, repetition_penalty=1.0, eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    if seed is not None:
        torch.manual_seed(seed)
    found: dict[int, tuple[str, bool]] = {}
    start = 0
    while start < len(order):
        chosen = order[start : start + min(batch_size, max(1, PROMPT_TOKENS // max(1, lengths[order[start]])))]
        start += len(chosen)
        batch = tokenizer(
            [texts[index] for index in chosen], add_special_tokens=False, padding=True, padding_side="left",
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        output = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
        )
        new = output[:, batch["input_ids"].shape[1] :].cpu()
        has_ended = torch.isin(new, torch.tensor(ends)).any(1).tolist()
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        found |= dict(zip(chosen, zip(decoded, has_ended, strict=True), strict=True))
    return [found[index] for index in range(len(texts))]


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model and that of the tokenizer."""
    of_model = model.generation_config.eos_token_id
    known = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*known, tokenizer.eos_token_id) if token is not None})
