"""Teacher: the interface through which the Trainer gets a teacher's distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError

from ..losses.chunked import Head
from ..losses.distillation import HiddenRows, SampledRows
from .frozen import FrozenTeacher
from .itself import SelfTeacher


class Teacher(Protocol):
    """A source of next-token distributions."""

    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module) -> HiddenRows | SampledRows:
        """The distributions of the labelled tokens of a batch; takes columns of its own out of `inputs`.

        Args:
            inputs: a batch with `labels`.
            student: the model as the Trainer calls it.
        """

    def collate(self, collator: Callable, which: str) -> Callable:
        """The collator of the "train" or the "eval" set, with what this teacher needs in a batch."""

    def check(self, trains: bool) -> None:
        """Raise a UserError if it cannot teach a run that trains, or one that evaluates only."""


def as_teacher(
    teacher: PreTrainedModel | Teacher | str, student: PreTrainedModel, head: Head | None, accelerator: Accelerator
) -> Teacher:
    """Turn the Trainer's argument `teacher` into a Teacher.

    Args:
        teacher: a model, which is frozen; a Teacher; or "self", the student with its quantizers off.
        head: of the student.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(teacher, PreTrainedModel):
        return FrozenTeacher(teacher, accelerator.device, accelerator)
    if teacher == "self":
        return SelfTeacher(student, head)
    if isinstance(teacher, str):
        raise UserError(f"teacher={teacher!r} is neither a model nor a Teacher nor 'self'")
    return teacher
