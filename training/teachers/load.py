"""Load a frozen teacher in BF16: a copy of the student, or another model with the same tokens."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from data.tokenizer import load_tokenizer
from qat.checkpoints.load import TEACHER_ARGUMENT, load_plain
from qat.errors import UserError


def load_teacher(
    model: PreTrainedModel, name_or_path: str | None, cache_dir: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen teacher in BF16: a copy of `model`, not yet prepared for QAT, or another model by name.

    Raises:
        UserError: see `load_plain` and `check_teacher`; or one of the two has no tokenizer.
    """
    if name_or_path is None:
        teacher = _bfloat16_copy(model)
    else:
        options = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        teacher = load_plain(name_or_path, TEACHER_ARGUMENT, torch.bfloat16, **options)
        teacher_tokenizer = load_tokenizer(name_or_path, argument=TEACHER_ARGUMENT, **options)
        student_tokenizer = load_tokenizer(model.config._name_or_path, **options)
        check_teacher(model, teacher, student_tokenizer, teacher_tokenizer)
    teacher.config.use_cache = False
    return teacher.requires_grad_(False).eval()


def _bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with parameters in BF16, made one by one, and buffers as they are: frequencies of rotary embeddings lose
    their meaning in BF16. Buffers are copied too, since FSDP1 marks those that it has sent to other processes."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = torch.nn.Parameter(parameter.detach().to(torch.bfloat16, copy=True), False)
    return copy.deepcopy(model, copies)


def check_teacher(student: nn.Module, teacher: nn.Module, student_tokenizer=None, teacher_tokenizer=None) -> None:
    """Refuse a teacher whose logits mean other tokens than the student's.

    Raises:
        UserError: the vocabularies differ in size, or the tokenizers in content.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--teacher_model_name_or_path has a vocabulary of {sizes[1]} tokens, the student of {sizes[0]}; "
            "distillation compares distributions over the same tokens, so choose a teacher of the same family"
        )
    if student_tokenizer is None or teacher_tokenizer is None:
        return
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = next(iter({*ours.items()} ^ {*theirs.items()}))[0]
        raise UserError(
            f"the teacher's tokenizer differs from the student's, at token {token!r} (ids {theirs.get(token)} and "
            f"{ours.get(token)}); choose a teacher with the same tokenizer"
        )
