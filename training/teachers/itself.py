"""SelfTeacher: the student with its quantizers off, and its adapters as they were at the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.layers.lora import adapters, adapters_at_start
from qat.layers.packed_base import packed_sites
from qat.layers.sites import quantized_sites, quantizers_off

from ..arguments.distillation import SELF_IN_TRAINING
from ..losses.chunked import Head, Rows
from ..losses.distillation import HiddenRows


class SelfTeacher:
    """The student itself with its quantizers off: no memory, one more forward.

    With adapters the weights are frozen, so the model without quantizers, its adapters as they were at the start, is
    the model that the stage starts from, whatever is trained. Where all weights are trained, its distributions change
    with them; the student could lower the divergence by changing its teacher, so training is refused then.

    Raises:
        UserError: the model has no quantized layer, or a packed base, or its head is not known.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None) -> None:
        if not (quantized_sites(model) or adapters(model)):
            raise UserError(
                "--distill_teacher self: the model has no quantized layer, so it is its own teacher already; "
                "give --quant_scheme, or choose copy or cache"
            )
        if packed_sites(model):
            raise UserError(
                "--distill_teacher self: the weights of the model are packed, so without quantizers it is its rounded "
                "base, not the model that it came from; choose cache or copy"
            )
        if head is None:
            raise UserError(
                f"--distill_teacher self needs a head of known form, {type(model).__name__}'s is not; choose copy"
            )
        self.model, self.head = model, head

    def collate(self, collator: Callable, which: str) -> Callable:
        """See `Teacher.collate`: batches need nothing more."""
        return collator

    def check(self, trains: bool) -> None:
        """See `Teacher.check`: only while no weight changes."""
        if trains and not adapters(self.model):
            raise UserError(SELF_IN_TRAINING)

    @torch.no_grad()
    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module) -> HiddenRows:
        """Hidden states of the labelled tokens of a batch (with `labels`), from the model as the Trainer calls it."""
        inputs = dict(inputs)
        objective = Rows(inputs.pop("labels"))
        was_training = student.training
        student.eval()
        try:
            with quantizers_off(self.model), adapters_at_start(self.model):
                hidden = student(**inputs, objective=objective)["rows"]
        finally:
            student.train(was_training)
        return HiddenRows(hidden, self._logits)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with quantizers_off(self.model), adapters_at_start(self.model):
            return self.head.logits(hidden)
