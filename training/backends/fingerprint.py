"""A cheap fingerprint of a model's weights, which tells two models of one shape apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_VALUES = 64  # of each tensor, evenly spread


@torch.no_grad()
def fingerprint(model: nn.Module) -> str | None:
    """A checksum of the names, shapes and some values of all parameters; None for a process that has no weights.

    The same values in another dtype, if it holds them exactly, have the same fingerprint.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            return None
        if name.endswith(".packed.codes"):  # of a zero they have a sign, which the base that a run wrote may lose
            continue
        values = parameter.detach().reshape(-1)
        some = values[:: max(1, len(values) // _VALUES)][:_VALUES].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
