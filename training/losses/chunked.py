"""The loss from hidden states: logits exist for some tokens at a time, forward and backward.

A batch's logits are its largest tensor: 8,192 tokens x 128,256 x 4 bytes = 4.2 GB, and a plain loss holds several of
that size (accelerate converts a model's BF16 output to FP32 as a whole, the softmax is kept for backward, the gradient
is as large). Here the head is applied to some labelled tokens, the loss of those and its gradient with respect to their
hidden states and to the head's parameters are computed at once, and their logits are forgotten; backward only scales
what is there. Nothing is computed twice, and tokens without a label never meet the head.

Where this happens is decided by wrappers. DDP and FSDP want all parameters used inside the wrapped model's forward, and
FSDP2 gathers the head's weight in hooks around the head's own call. So the two `forward` methods themselves learn it:
the model's passes hidden states to the head instead of making an output, and the head's, given an `Objective`, returns
losses instead of logits. Without an objective both do what they did, and no name in the state dict changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qat.errors import UserError

from .distillation import CHUNK, Objective, labelled_rows
from .head_gradient import GradientSums, MatrixHead, MatrixSum, is_matrix
from .router_loss import NAME as ROUTER_LOSS
from .router_loss import RouterLoss

# What models do to the head's output, by the name of the setting in their config: Gemma 2; Granite; Cohere; Falcon-H1.
_TRANSFORMS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logits_scaling": lambda logits, scale: logits / scale,
    "logit_scale": lambda logits, scale: logits * scale,
    "lm_head_multiplier": lambda logits, scale: logits * scale,
}


class UnknownHead(UserError):
    """A model's logits are not a known function of its base model's last hidden states."""


class Head:
    """How a model gets from hidden states to logits: its output embedding, then perhaps a cap or a factor.

    Args:
        module: the output embedding.
        transform: the setting in the model's config that is applied to its output ("final_logit_softcapping"), or "".
        value: of that setting.
    """

    def __init__(self, module: nn.Module, transform: str = "", value: float | None = None) -> None:
        self.module, self.transform, self.value = module, transform, value
        # By name: FSDP1 takes parameters out of their module and puts plain views there while it computes.
        self._parameters = [attrgetter(name) for name, _ in module.named_parameters()]
        self.plain_forward = module.forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., V], without the module's hooks."""
        return self.transformed(self.plain_forward(hidden))

    def transformed(self, output: torch.Tensor) -> torch.Tensor:
        """The module's output -> the model's logits."""
        return _TRANSFORMS[self.transform](output, self.value) if self.transform else output

    def loss(self, rows: torch.Tensor, objective: Objective) -> dict[str, torch.Tensor]:
        """`chunked_loss` of hidden states [n, H], with gradients to the head's parameters."""
        parameters = [get(self.module) for get in self._parameters]
        is_plain = is_matrix(self.module, self.plain_forward)
        head = MatrixHead(parameters[0], self.transformed) if is_plain else self.logits
        return chunked_loss(rows, objective, head, parameters)


def head_with(model: PreTrainedModel, transform: str) -> Head:
    """The head of a model whose `transform` is known (see `find_head`)."""
    value = getattr(model.config.get_text_config(), transform) if transform else None
    return Head(model.get_output_embeddings(), transform, value)


def possible_heads(model: PreTrainedModel) -> list[Head]:
    """What a model's head may be, as its config says; the likeliest first."""
    config = model.config.get_text_config()
    heads = [head_with(model, name) for name in _TRANSFORMS if getattr(config, name, None) is not None]
    return [*heads, head_with(model, "")]


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head:
    """The head of a model, tried on a few tokens: what it computes are the model's own logits.

    Raises:
        UnknownHead: it has none, or its logits are made in a way that is not known here.
    """
    module, base = model.get_output_embeddings(), model.base_model
    if module is None or base is model:
        raise UnknownHead(f"{type(model).__name__} has no output embedding on top of a base model")
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    was_training = model.training
    model.eval()
    try:
        forward = getattr(model, "_original_forward", model.forward)  # accelerate's wrapper of it adds autocast
        own = forward(input_ids=ids, use_cache=False).logits
        output = module(base(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception as error:  # remote code may do anything
        raise UnknownHead(f"{type(model).__name__}: {type(error).__name__}: {error}") from error
    finally:
        model.train(was_training)
    heads = possible_heads(model)
    errors = [float((head.transformed(output) - own).abs().max()) for head in heads]
    best = min(range(len(heads)), key=errors.__getitem__)
    if not errors[best] <= 1e-5 * float(own.abs().max()):
        raise UnknownHead(f"{type(model).__name__} computes its logits in a way that is not known here")
    return heads[best]


def attach(model: PreTrainedModel, head: Head, router_loss: RouterLoss | None = None) -> None:
    """Let `model(**inputs, objective=...)` return the dict of `chunked_loss` instead of an output with logits.

    Call it before the model is wrapped. `model(**inputs, objective=Rows(labels))` returns hidden states.

    Args:
        router_loss: in training, the dict has its value too, a scalar under "aux_loss".
    """
    plain = model.forward.__func__
    module = head.module

    @functools.wraps(plain)
    def forward(self, *args, objective: Objective | Rows | None = None, **kwargs):
        if objective is None:
            return plain(self, *args, **kwargs)
        if router_loss is None or isinstance(objective, Rows) or not self.training:
            return module(self.base_model(*args, **kwargs).last_hidden_state, objective)
        output = self.base_model(*args, **kwargs, output_router_logits=True)
        aux_loss = router_loss(output.router_logits, kwargs.get("attention_mask"))
        return {**module(output.last_hidden_state, objective), ROUTER_LOSS: aux_loss}

    @functools.wraps(head.plain_forward)
    def head_forward(self, hidden, objective: Objective | Rows | None = None):
        return head.plain_forward(hidden) if objective is None else _lose(hidden, objective)

    @torch.compiler.disable
    def _lose(hidden, objective):
        rows = labelled_rows(hidden, objective.labels)
        return {"rows": rows} if isinstance(objective, Rows) else head.loss(rows, objective)

    model.forward = MethodType(forward, model)
    module.forward = MethodType(head_forward, module)


@dataclass
class Rows:
    """In place of an objective: the hidden states [n, H] of the labelled tokens are wanted, as "rows"."""

    labels: torch.Tensor


# ---- The loss ----


def chunked_loss(
    rows: torch.Tensor,
    objective: Objective,
    head: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
    parameters: list[torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The summed loss of n tokens.

    Args:
        rows: what `head` takes, [n, H]; logits [n, V] for the default head.
        parameters: tensors that `head` computes with and that may need gradients.

    Returns:
        "loss": scalar, the weighted sum over tokens and terms; its gradient may be taken once. "token_losses":
        [n, terms], detached, in the order of `objective.weights`.
    """
    if not torch.is_grad_enabled():  # a Function is told that parameters need gradients all the same
        rows, parameters = rows.detach(), None
    loss, token_losses = _ChunkedLoss.apply(rows, objective, head, *(parameters or ()))
    return {"loss": loss, "token_losses": token_losses}


def _chunk_size(device_type: str, hidden_size: int) -> int | None:
    """Tokens whose logits, in the model's dtype, exist at a time in training.

    Each chunk adds its part to the FP32 gradient of the head, whatever its size (head_gradient.py). A GPU multiplies so
    much faster than it moves memory that this would take longer than the head's products with 512 tokens; half of H, up
    to 2,048, take hardly more memory than the gradient's own parts do.
    """
    return None if device_type == "cpu" else min(2048, max(CHUNK, hidden_size // 2))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, objective, head, *parameters):
        needs_rows, *needs_parameters = (ctx.needs_input_grad[i] for i in (0, *range(3, 3 + len(parameters))))
        wanted = [p for p, needed in zip(parameters, needs_parameters, strict=True) if needed]
        sums = MatrixSum(head, bool(wanted)) if isinstance(head, MatrixHead) else GradientSums(wanted, head)
        gradient = torch.zeros_like(rows) if needs_rows else None
        parts = []
        size = _chunk_size(objective.device_type or rows.device.type, rows.shape[-1]) if wanted else None
        for part in objective.parts(len(rows), size):
            with torch.set_grad_enabled(needs_rows or bool(wanted)):
                inputs = rows[part].detach().requires_grad_(needs_rows or sums.reads_inputs)
                # A view, no leaf: autocast would keep its BF16 copies of the leaves of all parts until it ends.
                losses = objective.token_losses(sums.head(inputs.view_as(inputs)), part)
                parts.append(losses.detach())
                if not losses.requires_grad:
                    continue
                weighted = objective.weighted_sum(losses, part)
            grads = list(torch.autograd.grad(weighted, [inputs] * inputs.requires_grad + sums.differentiated))
            if gradient is not None:
                gradient[part] = grads.pop(0)
            sums.add(grads)
            del grads  # a part's gradient of the head would live until that of the next part is there
        ctx.gradients = gradient, sums.take()
        ctx.needs_parameters = needs_parameters
        token_losses = torch.cat(parts) if parts else rows.new_zeros(0, len(objective.weights), dtype=torch.float32)
        ctx.mark_non_differentiable(token_losses)
        return objective.weighted_sum(token_losses), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        assert ctx.gradients is not None, "the gradient of a chunked loss can be taken once"
        rows, parameters = ctx.gradients
        ctx.gradients = None
        for tensor in ([] if rows is None else [rows]) + parameters:
            tensor.mul_(grad)
        given = iter(parameters)
        return rows, None, None, *(next(given) if needed else None for needed in ctx.needs_parameters)
