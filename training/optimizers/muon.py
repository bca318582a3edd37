"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

torch.optim.Muon (Keller Jordan, 2024) replaces a matrix's momentum by an orthogonal matrix near to it. It keeps one
FP32 number a parameter, AdamW two. It is meant for the weights of hidden layers; embeddings, head, norms, biases and
experts in fused 3-D parameters are updated by AdamW. Its updates are scaled to the size of AdamW's (Liu et al.,
arXiv:2502.16982), so one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import torch
from torch import nn

ADJUST = "match_rms_adamw"


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for groups of parameters with `"muon": True`, torch.optim.AdamW for the others."""

    def __init__(self, params, **defaults) -> None:
        one = [nn.Parameter(torch.zeros(1, 1))]  # the two optimizers compute; groups and state are of this one
        shared = {name: defaults.pop(name) for name in ("lr", "weight_decay")}
        self._adamw = torch.optim.AdamW(one, **shared, betas=defaults.pop("betas"), eps=defaults.pop("eps"))
        self._muon = torch.optim.Muon(one, **shared, **defaults, adjust_lr_fn=ADJUST)
        groups = [{**self._settings(group.get("muon", False)), **group} for group in params]
        super().__init__(groups, {"muon": False, **self._adamw.defaults})

    def _settings(self, is_muon: bool) -> dict:
        return {"muon": is_muon, **(self._muon if is_muon else self._adamw).defaults}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            inner = self._muon if group["muon"] else self._adamw
            inner.param_groups, inner.state = [group], self.state
            inner.step()
        return loss


class MuonFactory:
    """What Trainer calls with the model to make a `Muon`."""

    def __call__(self, model: nn.Module, decays: set[str], weight_decay: float, **settings) -> Muon:
        """Groups of parameters by their optimizer and by whether they decay.

        Args:
            decays: names of parameters that have weight decay.
        """
        hidden = hidden_matrices(model)
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in hidden, name in decays), []).append(parameter)
        named = [
            {"params": params, "muon": is_muon, "weight_decay": weight_decay if is_decaying else 0.0}
            for (is_muon, is_decaying), params in groups.items()
        ]
        return Muon(named, weight_decay=weight_decay, **settings)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D parameters of `model` outside of embeddings and of its head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    excluded = {id(p) for module in outside for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in excluded}
