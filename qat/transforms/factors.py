"""The factors that smooth an activation: their formula, and the tensors that absorb them.

    s_j = max|X_j|^alpha / max|W_j|^beta          beta = 1 - alpha: SmoothQuant's (Xiao et al., arXiv:2211.10438)

over their geometric mean.
"""

from __future__ import annotations

import torch

from .activations import Activation

_SMALLEST = 1e-5  # maxima are taken to be at least this: a dead channel needs no factor


def factors_of(activation: Activation, alpha: float, beta: float) -> torch.Tensor:
    """The factors of an activation by its weights as they are now, FP32, one for each output of its producer."""
    ndim = activation.largest.ndim
    weight = torch.stack([_reduced(reader.largest(), ndim) for reader in activation.readers]).amax(0)
    return smoothing_factors(activation.by_output(activation.largest), activation.by_output(weight), alpha, beta)


def apply_factors(activation: Activation, factors: torch.Tensor) -> None:
    """Divide what an activation's producer puts out, and multiply the weights that read it, in place."""
    activation.producer.divide(factors)
    for reader in activation.readers:
        reader.multiply(activation.by_channel(factors))


def _reduced(largest: torch.Tensor, ndim: int) -> torch.Tensor:
    """[..., K] -> [K] if `ndim` is 1: the largest of all experts, where one activation reaches all of them."""
    return largest.flatten(0, -2).amax(0) if largest.ndim > ndim else largest


def smoothing_factors(
    largest_input: torch.Tensor, largest_weight: torch.Tensor, alpha: float, beta: float
) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^beta over their geometric mean, FP32 [..., channels]; see the top.

    1 where no channel was seen: of an expert that no token reached.
    """
    factors = largest_input.clamp(min=_SMALLEST) ** alpha / largest_weight.clamp(min=_SMALLEST) ** beta
    factors = factors / factors.log().mean(-1, keepdim=True).exp()
    return torch.where(largest_input.amax(-1, keepdim=True) > 0, factors, 1)
