"""What stands between the two products of an expert, by vLLM's names of activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Gate = Callable[[torch.Tensor], torch.Tensor]
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss


def gate_of(activation: str, limit: float | None = None) -> Gate:
    """The function [S, 2 * I] -> [S, I], or [S, I] -> [S, I] where there is no gate.

    Args:
        limit: at which the model clamps what the gate multiplies.

    Raises:
        ValueError: the plugin has none for the activation.
    """
    if activation not in _GATES or (limit is not None and (activation, limit) != ("swigluoai", LIMIT)):
        clamped = "" if limit is None else f" clamped at {limit}"
        known = ", ".join(_GATES)
        raise ValueError(f"the plugin of mx-qat has no experts with {activation}{clamped}; it has {known}, unclamped")
    return _GATES[activation]


def _gated(function: Gate) -> Gate:
    """Columns of the gate stand first."""

    def gate(y: torch.Tensor) -> torch.Tensor:
        first, up = y.chunk(2, dim=-1)
        return function(first) * up

    return gate


def _clamped_swiglu(y: torch.Tensor) -> torch.Tensor:
    """gpt-oss: columns of gate and up take turns."""
    gate, up = y[..., ::2].clamp(max=LIMIT), y[..., 1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


def _gelu_tanh(y: torch.Tensor) -> torch.Tensor:
    return F.gelu(y, approximate="tanh")


_GATES: dict[str, Gate] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(_gelu_tanh),
    "swigluoai": _clamped_swiglu,
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": _gelu_tanh,
    "relu2_no_mul": lambda y: F.relu(y).square(),
}
