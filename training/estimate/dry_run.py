"""Compute one step on fake tensors: what is kept for the backward pass, and how much exists at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from qat.layers.lora import adapters_at_start
from qat.layers.sites import quantizers_off

from ..losses.chunked import Head, possible_heads
from ..losses.distillation import HiddenRows, Objective, SampledRows
from .fake_model import (
    copy_of,
    give_fake_tensors,
    layers_of,
    parameters_of,
    set_attention,
    set_checkpointing,
)
from .live_bytes import LiveBytes, Moment
from .plan import CACHE, FSDP2, NO_TEACHER, SELF, Plan

FORWARD, LOSS, BACKWARD = "forward pass", "loss", "backward pass"


@dataclass(frozen=True)
class DryRun:
    """What one step takes beside parameters, optimizer states and the teacher's parameters, in bytes.

    Attributes:
        kept: exists when the loss begins: what is kept for the backward pass, hidden states of a teacher.
        peaks: of each phase.
    """

    kept: int
    peaks: dict[str, Moment]


class NotOnFakeTensors(Exception):
    """A model's code cannot be run on fake tensors: it looks at their values, or calls a kernel that knows none."""


class _EveryToken(Objective):
    """An objective in which every token is labelled: the labels of a run are not known, nor those of fake tensors.

    The peak is in the second part, beside what the first has left; those that follow would take time alone.
    """

    def __post_init__(self) -> None:
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        self.targets = self.labels[:, 1:].reshape(-1)
        self.is_domain = None

    def parts(self, count: int, size: int | None) -> list[slice]:
        return super().parts(count, size)[:2]


def dry_run(student: PreTrainedModel, teacher: PreTrainedModel | None, plan: Plan) -> DryRun:
    """One step of training, or a forward pass of an evaluation.

    Args:
        student: prepared for its schemes, with adapters where the plan has some; parameters on the meta device. It is
            not changed.
        teacher: of a copy or another model; likewise.

    Raises:
        NotOnFakeTensors: the code of the model or of the teacher does what fake tensors cannot.
    """
    student, teacher = copy_of(student), None if teacher is None else copy_of(teacher)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes(1 / plan.backend.parts)
    with mode, live:
        step = _Step(give_fake_tensors(student, mode, _dtype_in_forward(plan)), plan, live)
        if teacher is not None:
            give_fake_tensors(teacher, mode, torch.bfloat16)
        ids = torch.zeros(plan.batch, plan.length, dtype=torch.long)
        live.begin(FORWARD)
        with _autocast(plan), torch.set_grad_enabled(plan.trains):
            loss = step.loss(ids, step.teacher_rows(ids, teacher))
        if plan.trains:
            live.begin(BACKWARD, adds_in_place=True)
            with _family():
                loss.backward()
    return DryRun(step.kept, live.peaks)


def _dtype_in_forward(plan: Plan) -> torch.dtype:
    if plan.lora_r:
        return torch.bfloat16
    return plan.master_dtype if plan.gather_dtype == torch.float32 else plan.gather_dtype


def _autocast(plan: Plan) -> AbstractContextManager:
    if plan.compute_dtype == torch.float32:
        return nullcontext()
    # No cache under FSDP2: it would keep a copy of each gathered weight.
    return torch.autocast("cpu", plan.compute_dtype, cache_enabled=plan.backend.name != FSDP2)


@contextmanager
def _family() -> Iterator[None]:
    """Run the code of a model's family inside."""
    try:
        yield
    except Exception as error:  # it may do anything
        first = (str(error).strip().splitlines() or [""])[0]
        raise NotOnFakeTensors(f"{type(error).__name__}: {first[:160]}") from error


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of a batch."""
    with _family():
        return model.base_model(input_ids=ids).last_hidden_state


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with _family():
        return model(input_ids=ids).logits


class _Step:
    """A model on fake tensors that is ready for a step."""

    def __init__(self, model: PreTrainedModel, plan: Plan, live: LiveBytes) -> None:
        self.model, self.plan, self.live = model, plan, live
        self.head = _head_of(model)
        self.kept = 0
        model.train(plan.trains)
        set_attention(model, plan)
        if not plan.trains:
            return
        set_checkpointing(model, plan)
        self._follow_gradients()

    def _follow_gradients(self) -> None:
        """Tell complete gradients from everything else, or free them where the optimizer does.

        FSDP has whole gradients of what is in no layer, such as the embedding, until the backward pass ends.
        """
        plan, layers = self.plan, layers_of(self.model)
        in_layers = {id(p) for p in parameters_of(layers)}
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            if plan.in_backward:
                parameter.register_post_accumulate_grad_hook(_forget)
            elif not plan.backend.shards or id(parameter) in in_layers:
                parameter.register_post_accumulate_grad_hook(lambda p: self.live.settle(p.grad))

    def teacher_rows(self, ids: torch.Tensor, teacher: PreTrainedModel | None) -> HiddenRows | SampledRows | None:
        """The teacher's distributions of a batch."""
        plan = self.plan
        if plan.teacher == NO_TEACHER or self.head is None:
            return None
        if plan.teacher == CACHE:
            count = ids.shape[0] * (ids.shape[1] - 1)
            kept = torch.zeros(count, plan.teacher_tokens, dtype=torch.int32)
            return SampledRows(kept, torch.zeros(kept.shape), torch.zeros(count))
        if plan.teacher == SELF:
            self.model.eval()
            with torch.no_grad(), quantizers_off(self.model), adapters_at_start(self.model):
                rows = _rows(_hidden(self.model, ids))
            self.model.train(plan.trains)
            return HiddenRows(rows, self.head.logits)
        assert teacher is not None, "a copy or another model was given"
        set_attention(teacher, plan)
        head = _head_of(teacher.requires_grad_(False).eval())
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if head is None:
                return HiddenRows(_rows(_logits(teacher, ids)))
            return HiddenRows(_rows(_hidden(teacher, ids)), head.logits)

    def loss(self, ids: torch.Tensor, teacher: HiddenRows | SampledRows | None) -> torch.Tensor:
        """The loss of a batch; with accumulation, gradients of the batch before exist already."""
        plan = self.plan
        if plan.accumulates and plan.trains and not plan.in_backward:
            for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                parameter.grad = torch.empty_like(parameter)
                self.live.settle(parameter.grad)
        weights = {"ce": plan.ce_weight, "kl": 1 - plan.ce_weight} if plan.teaches else {"ce": 1.0}
        objective = _EveryToken(ids, teacher, weights, device_type=plan.device)
        if self.head is None or plan.smooths_labels:
            return self._loss_of_logits(ids)
        hidden = _hidden(self.model, ids)
        self._loss_begins()
        return self.head.loss(_rows(hidden), objective)["loss"]

    def _loss_of_logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits = _logits(self.model, ids).float()
        self._loss_begins()
        return F.cross_entropy(_rows(logits), ids[:, 1:].reshape(-1))

    def _loss_begins(self) -> None:
        self.kept = self.live.now.work
        self.live.begin(LOSS)


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[batch, time, D] -> [n, D], a copy, as of `labelled_rows`."""
    return states[:, :-1].reshape(-1, states.shape[-1])


def _head_of(model: PreTrainedModel) -> Head | None:
    """What `find_head` most likely finds; it compares values, which fake tensors have not."""
    if model.get_output_embeddings() is None or model.base_model is model:
        return None
    return possible_heads(model)[0]
