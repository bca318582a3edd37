"""FrozenTeacher: a model in memory that does not change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from qat.layers.sites import quantizers_off

from ..losses.chunked import Head, UnknownHead, find_head, head_with
from ..losses.distillation import HiddenRows, labelled_rows
from .norms import use_one_kernel
from .precision import needs_autocast

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A model in memory that does not change: gradients off, on the device of the run, sharded under FSDP.

    Its body and its head are kept apart. The body is wrapped by FSDP like the student; the head is whole on every
    device (vocabulary x hidden x 2 bytes in BF16), because it is used while the student's forward runs, outside of the
    body's own.

    Args:
        model: the teacher, unwrapped; on FSDP's other processes its weights may be empty, they are sent from the first.
        device: where the run computes.
        accelerator: of the run; None keeps the teacher whole and this process by itself.

    Raises:
        UserError: it cannot compute in its dtype, see `needs_autocast`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, accelerator: Accelerator | None = None) -> None:
        model.requires_grad_(False).eval()
        self.device = device
        self.autocasts = needs_autocast(model, accelerator)
        is_sharded = accelerator is not None and accelerator.distributed_type == DistributedType.FSDP
        if not is_sharded:
            model.to(device)  # first: the head is found by two forward passes
        with self._precision():
            self.head = agreed_head(model, accelerator)
        body = model if self.head is None else model.base_model
        if device.type == "cuda":
            use_one_kernel(body, device)
        if not is_sharded:
            self.body = body
            return
        if self.head is not None:
            module = copy.deepcopy(self.head.module)  # its weight may be tied to the body's
            empty = any(parameter.is_meta for parameter in module.parameters())
            module = module.to_empty(device=device) if empty else module.to(device)
            for parameter in module.parameters():
                parameter.data = broadcast(parameter.data)
            self.head = Head(module, self.head.transform, self.head.value)
        self.body = shard(body, accelerator)

    def collate(self, collator: Callable, which: str) -> Callable:
        """See `Teacher.collate`: batches need nothing more."""
        return collator

    def check(self, trains: bool) -> None:
        """See `Teacher.check`: a model that does not change may always teach."""

    @torch.no_grad()
    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module | None = None) -> HiddenRows:
        """Hidden states of the labelled tokens of a batch (with `labels`)."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with self._precision():
            output = self.body(**inputs)
        if self.head is None:
            return HiddenRows(labelled_rows(output.logits, labels))
        return HiddenRows(labelled_rows(output.last_hidden_state, labels), self.head.logits)

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocasts else nullcontext()


def agreed_head(model: PreTrainedModel, accelerator: Accelerator | None) -> Head | None:
    """`find_head` on the first process, whose weights are loaded in every setting; None, and a warning, without one."""
    found: list[str | None] = ["", None]
    if accelerator is None or accelerator.is_main_process:
        try:
            with quantizers_off(model):  # under FSDP the weights are on the CPU, which rounds them slowly
                found = [find_head(model).transform, None]
        except UnknownHead as error:
            found = ["", str(error)]
            logger.warning("%s: the logits of a whole batch will be held in memory", error)
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(found)
    return None if found[1] else head_with(model, found[0])


def shard(body: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen module by FSDP under the run's settings.

    `Accelerator.prepare_model(evaluation_mode=True)` wraps nothing, and refuses FSDP2 without an optimizer.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, body)
    return accelerator.prepare_model(body)
