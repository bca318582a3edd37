"""Learned block exponents have a parameter group of their own: they move in whole steps, weights in tiny ones."""

from __future__ import annotations

import torch
from torch import nn

from qat.layers.finish import OFFSET_SUFFIX


def separate_exponents(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Move the exponent offsets of `model` into a group of `optimizer` with this learning rate and no weight decay.

    An offset does something only once it has passed 0.5, and an Adam step moves it by about the learning rate.
    """
    offsets = {id(p): p for name, p in model.named_parameters() if name.endswith(OFFSET_SUFFIX) and p.requires_grad}
    if not offsets:
        return
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in offsets]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": list(offsets.values()), "lr": learning_rate, "weight_decay": 0.0})
