"""StepsInBackward: each parameter is updated, and its gradient freed, as soon as backward has computed it.

So the gradients of a model never exist together: at most a layer's do. The update of a parameter cannot wait for those
that backward reaches later, so there is no norm of the whole gradient to clip by, nothing to accumulate, and a step
whose gradient is not finite cannot be withheld: it ends the run (resume/safeguards.py), whose checkpoints are of the
steps before.

FSDP2 calls the hooks of a parameter once its gradient is reduced over processes. DDP and FSDP1 reduce later.

The optimizer is Trainer's own: its groups are narrowed to one parameter for the time of a step. State, learning rates
and checkpoints are those of a run that updates all parameters after backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from qat.errors import RunFault


class UpdatedTwiceError(RunFault, RuntimeError):
    """The gradient of a parameter came in two parts, of which the first was applied already."""


class StepsInBackward(TrainerCallback):
    """Let a Trainer's optimizer step parameter by parameter while backward runs."""

    def __init__(self) -> None:
        self._hooks: list = []
        self._norms: list[torch.Tensor] = []
        self._updated: set[int] = set()
        self._group: dist.ProcessGroup | None = None  # that shards gradients

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Hook every parameter that the optimizer updates."""
        self.remove()
        self.attach(getattr(optimizer, "optimizer", optimizer))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters of `optimizer` from now on when their gradients are there."""
        if (number := getattr(optimizer, "number_parameters", None)) is not None:
            number()
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._stepping(optimizer, index)))

    def _stepping(self, optimizer: torch.optim.Optimizer, index: int) -> Callable[[torch.Tensor], None]:
        def step(parameter: torch.Tensor) -> None:
            if id(parameter) in self._updated:
                raise UpdatedTwiceError(
                    f"--optimizer_in_backward True: the gradient of a parameter of shape {list(parameter.shape)} came "
                    "in two parts, and the first is applied already: reentrant activation checkpointing or a layer "
                    "that runs in several backward passes does that; give --activation_checkpointing_kwargs "
                    "'{\"use_reentrant\": false}', or leave --optimizer_in_backward out"
                )
            self._updated.add(id(parameter))
            self._norms.append(self._norm(parameter.grad))
            step_one(optimizer, index, parameter)
            parameter.grad = None

        return step

    def _norm(self, gradient: torch.Tensor) -> torch.Tensor:
        if isinstance(gradient, DTensor):
            self._group, gradient = gradient.device_mesh.get_group(), gradient.to_local()
        return torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)

    def take_norm(self) -> torch.Tensor:
        """The norm of the step's whole gradient, FP32; the next step begins."""
        norms, self._norms, self._updated = self._norms, [], set()
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        if self._group is not None:
            square = norm.square()
            dist.all_reduce(square, group=self._group)
            norm = square.sqrt()
        return norm

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Gradients stay with their parameters again."""
        self.remove()

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._norms, self._updated = [], [], set()


def step_one(optimizer: torch.optim.Optimizer, index: int, parameter: nn.Parameter | torch.Tensor) -> None:
    """A step of `optimizer` that knows one parameter of its group `index` alone."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[index], "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
