"""LossTrainer: a Trainer whose losses are computed in chunks, from a teacher where there is one.

With a teacher, the loss is the divergence from its distribution (distillation.py). Losses are computed from hidden
states in chunks of tokens (chunked.py), so a batch's logits never exist.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from data.conversations.formatting import IGNORE_INDEX
from data.sets.mixing import COLUMN
from qat.errors import UserError

from .chunked import Head, chunked_loss
from .distillation import HiddenRows, Objective, SampledRows, labelled_rows
from .router_loss import NAME as ROUTER_LOSS
from .router_loss import RouterLoss, UnknownRouterLoss, find_router_loss, wants_router_loss
from .term_means import TermMeans

logger = logging.getLogger(__name__)


class LossTrainer(Trainer):
    """A Trainer that computes losses of its own; a class that has it as a base sets its attributes.

    Attributes:
        head: of the model, taught to compute losses; None where a batch's logits are needed.
        router_loss: what the model adds to its own loss.
        teacher: gives distributions, see teachers/protocol.py.
        distill_temperature: of both distributions in the training loss.
    """

    head: Head | None
    router_loss: RouterLoss | None
    teacher: Any
    distill_temperature: float
    _term_weights: dict[str, float]
    _term_means: TermMeans
    _generic_means: TermMeans
    _generic_items: torch.Tensor | int = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, or with a teacher the forward KL (weighted with cross-entropy), a mean over tokens.

        Where the model's config asks for it, the load-balancing loss of its routers is added, see router_loss.py.
        """
        if self.label_smoother is not None and self.compute_loss_func is None:
            return self._smoothed_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._computes_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        generic = inputs.pop(COLUMN, None)
        teacher = self._teacher_rows(model, inputs)
        objective = Objective(
            inputs.pop("labels"), teacher, self._term_weights, self.distill_temperature, generic=generic,
            tokens=None if generic is None else self._tokens_of_step(num_items_in_batch),
        )  # fmt: skip
        losses, outputs = self._losses(model, inputs, objective, return_outputs)
        aux_loss = losses.get(ROUTER_LOSS)
        if model.training:
            self._count_terms(losses["token_losses"], aux_loss, objective)
        if num_items_in_batch is None:
            loss = losses["loss"] / max(len(objective.targets), 1)
        else:  # labelled tokens of the whole step, on all processes, whose gradients DDP and FSDP will average
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = losses["loss"] / num_items_in_batch * processes
        if aux_loss is not None:
            loss = loss + self._router_term(aux_loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's own; counts the labelled tokens of generic text among those of the step, as Trainer counts all."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._generic_items = 0
        if items is not None and COLUMN in batches[0]:
            generic = [{"labels": batch["labels"].where(batch[COLUMN] == 1, IGNORE_INDEX)} for batch in batches]
            self._generic_items = self._get_num_items_in_batch(generic, device)
        return batches, items

    def _tokens_of_step(self, items: torch.Tensor | int | None) -> torch.Tensor | None:
        """Labelled tokens of a step, and those of the domain among them; None where a step's are not counted."""
        if items is None:
            return None
        counts = [torch.as_tensor(count) for count in (items, items - self._generic_items)]
        return torch.stack(counts).round().long()  # integers, which FSDP does not cast

    def _count_terms(self, token_losses: torch.Tensor, aux_loss: torch.Tensor | None, objective: Objective) -> None:
        """Count the terms of a batch for the log, those of generic text apart."""
        is_domain = objective.is_domain
        self._term_means.add(token_losses, aux_loss, is_domain)
        if is_domain is not None:
            divergence = token_losses[:, [list(objective.weights).index("kl")]]
            self._generic_means.add(divergence, None, ~is_domain)

    def _router_term(self, aux_loss: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """The load-balancing loss of a batch as a part of the loss: a mean over accumulated batches."""
        assert self.router_loss is not None
        if torch.is_grad_enabled() and not aux_loss.requires_grad:
            raise UserError(
                'config.json says "output_router_logits": true, and the gradient of the load-balancing loss reaches no '
                "parameter: activation checkpointing with use_reentrant drops it, or none that routers depend on is "
                "trained; give --activation_checkpointing_kwargs '{\"use_reentrant\": false}', or set "
                '"output_router_logits": false'
            )
        batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps  # else Trainer divides
        return aux_loss * (self.router_loss.factor / batches)

    def _computes_loss(self) -> bool:
        """Whether the loss is ours and not transformers'."""
        return self.teacher is not None or self._is_plain_cross_entropy()

    def _is_plain_cross_entropy(self) -> bool:
        """Whether the model's own loss is the mean cross-entropy of labelled tokens and nothing else."""
        if self.head is None or self.label_smoother is not None or self.compute_loss_func is not None:
            return False
        model = self.accelerator.unwrap_model(self.model)
        is_whole = self.router_loss is not None or not wants_router_loss(model)
        return model.loss_function is ForCausalLMLoss and is_whole

    def _smoothed_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """Trainer's own loss with smoothed labels, which are shifted by one token for every model.

        transformers 5.23 shifts them only for classes that it knows by name, and FSDP2 renames the class of a model.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.label_smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if model.training and self.router_loss is not None:
            loss = loss + self._router_term(outputs.aux_loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _teacher_rows(self, model, inputs: dict) -> HiddenRows | SampledRows | None:
        """The teacher's distributions of a batch; removes cached columns from `inputs`."""
        if self.teacher is None:
            return None
        with self.compute_loss_context_manager():
            return self.teacher.rows(inputs, model)

    def _losses(self, model, inputs: dict, objective: Objective, return_outputs: bool = False):
        """`chunked_loss` and the model's outputs, where they are wanted or the head is not known."""
        if self.head is not None and not return_outputs:
            return model(**inputs, objective=objective), None
        outputs = model(**inputs)
        losses = chunked_loss(labelled_rows(outputs.logits, objective.labels), objective)
        if model.training and self.router_loss is not None:
            losses[ROUTER_LOSS] = outputs.aux_loss
        return losses, outputs

    def _find_router_loss(self, model: torch.nn.Module) -> RouterLoss | None:
        """What the model adds to its own loss; None, and a warning, where only the model itself can compute it."""
        try:
            return find_router_loss(self.accelerator.unwrap_model(model))
        except UnknownRouterLoss as error:
            if self.accelerator.is_main_process:
                logger.warning("losses are those of transformers, from the logits of a whole batch: %s", error)
            return None
