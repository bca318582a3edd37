"""The KL to a teacher on its own greedy answers to a task's problems.

Whether an answer is right says one bit about hundreds of tokens; the KL on them tells rows apart that solve about as
many problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.tasks.generation import as_chat

ANSWERS = ("gsm8k_answers", "humaneval_answers")
PROBLEMS = 64  # of a task, its first


def task_of(figure: str) -> str:
    """The task of one of ANSWERS."""
    return figure.removesuffix("_answers")


@torch.no_grad()
def kl_on_answers(
    model: nn.Module, teacher: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str],
    answers: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Forward KL in nats a token: the mean over answers of an answer's mean, "value", and its standard error, "error".

    Args:
        model: computes in its own dtype, as `teacher` does.
        questions: of users.
        answers: of the teacher to each, in its chat template.
    """
    found = []
    for question, text in zip(questions, answers, strict=True):
        prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (
            as_chat(tokenizer, question), text
        ))  # fmt: skip
        if answer:
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            own, theirs = (
                m(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                for m in (model, teacher)
            )
            found.append((theirs.exp() * (theirs - own)).sum(-1).double().mean().item())
    return {"value": mean(found), "error": stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan}
