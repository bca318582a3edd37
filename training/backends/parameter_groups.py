"""Parameters with optimizer settings of their own, found by the ends of their names, which no wrapper changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def separate(optimizer: torch.optim.Optimizer, model: nn.Module, settings: Mapping[str, dict]) -> None:
    """Move parameters of `model` whose names end in a key of `settings` into a group of `optimizer` with its value.

    Args:
        settings: of the optimizer, such as {"lr": 1e-2, "weight_decay": 0.0}, by the end of a name.
    """
    for suffix, options in settings.items():
        own = {id(p): p for name, p in model.named_parameters() if name.endswith(suffix) and p.requires_grad}
        if not own:
            continue
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({"params": list(own.values()), **options})
