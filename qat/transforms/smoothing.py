"""Smoothing: make activations easier to quantize before training begins, without changing what the model computes.

An MX block shares one scale, so a channel of large activations makes the 31 others beside it coarse; weights have no
such channels. SmoothQuant (Xiao et al., arXiv:2211.10438) divides each channel of an activation by a factor and
multiplies the weights that read it by the same factor:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)          alpha 0: no smoothing of X; alpha 1: all channels of X alike

The division costs nothing, since whatever produces the activation absorbs it: the norm before q/k/v or gate/up, v_proj
before o_proj, up_proj before down_proj (observation.py finds them). The factors of an activation have a geometric mean
of 1.

Some models use an activation in a way that is not seen, as a residual or through a function that is not linear. Their
logits move; the activation is undone, and the others stay smoothed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..layers.sites import quantizers_off
from .activations import Activation
from .equality import Equality
from .observation import Observation, observe

logger = logging.getLogger(__name__)

_SMALLEST = 1e-5  # maxima are taken to be at least this: a dead channel needs no factor
_TOLERANCE = 1e-4  # of the largest logit: rounding of FP32 moves logits by 1e-6 to 1e-5, a wrong activation by 5e-4 up
_LOTS = 4  # in which activations are smoothed; the tensors of one lot are kept, so that they can be undone
_CHECKED_TOKENS = 128  # an activation that is used in another way moves the logits of nearly all tokens


@dataclass(frozen=True)
class Smoothed:
    """What `smooth` did.

    Attributes:
        inputs: how many distinct inputs the quantized layers have.
        smoothed: how many of these are smoothed.
        left: what produces each activation that is not, since smoothing it moves the logits; how far, as a fraction of
            the largest logit.
        uncovered: the other inputs, each by one weight that reads it: nothing before them can absorb the factors.
        moved: how far the logits of the smoothed model have moved.
    """

    inputs: int
    smoothed: int
    left: dict[str, float]
    uncovered: tuple[str, ...]
    moved: float

    def __str__(self) -> str:
        text = f"smoothed {self.smoothed} of {self.inputs} activations"
        parts = list(_by_kind(self.left))
        if self.uncovered:
            parts.append(
                f"{len(self.uncovered)} with no norm, v_proj or gated up_proj directly before, e.g. the input of "
                f"{self.uncovered[0]}"
            )
        return f"{text}; left: {', '.join(parts)}" if parts else text


@torch.no_grad()
def smooth(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], alpha: float) -> Smoothed:
    """Smooth the inputs of the quantized layers of `model` in place, except those that would move its logits.

    Args:
        model: prepared by `prepare_qat`, its weights FP32 for exactness.
        batches: what the model is called with, on its device and without padding; the beginning of the longest one also
            serves to check that the model still computes the same.
        alpha: migration strength (SmoothQuant): how much of the outliers moves from activations into weights;
            above 0 and at most 1.

    Returns:
        What was smoothed and what was not, which is also logged: as a warning where the logits would have moved, or
        where nothing is smoothed.

    Raises:
        UserError: alpha is out of range, or there is no batch.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"smoothing alpha {alpha} is out of range; choose a number above 0 and at most 1, such as 0.7")
    batches = list(batches)
    if not batches:
        raise UserError("smoothing needs at least one sample; give more data, or leave smoothing off (alpha 0)")
    was_training = model.training
    model.eval()
    try:
        with quantizers_off(model), _without_cache(model):
            check = Equality(model, _beginning(max(batches, key=_tokens)))
            seen = observe(model, batches)
            left: dict[str, float] = {}
            kept = [a for lot in _lots(seen.activations) for a in _smooth_exactly(lot, alpha, check, left)]
            result = _summarize(seen, kept, left, check.moved() if kept else 0.0)
    finally:
        model.train(was_training)
    _log(model, result, alpha)
    return result


def _by_kind(left: dict[str, float]) -> Iterator[str]:
    """The activations that are left, those together whose names differ in numbers only."""
    kinds: dict[str, list[str]] = {}
    for name in left:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    for kind, names in kinds.items():
        moved = max(left[name] for name in names)
        alone = f"{names[0]} (logits move by {moved:.2g})"
        yield alone if len(names) == 1 else f"{len(names)} of {kind} (logits move by up to {moved:.2g})"


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No keys and values are kept inside: latent ones are copied into a cache, so their reader would not be seen."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _smooth_exactly(
    lot: Sequence[Activation], alpha: float, check: Equality, left: dict[str, float]
) -> list[Activation]:
    """Smooth those of a lot that do not move the logits, which are returned; the others go into `left`.

    All are smoothed, and the logits are compared once; where they moved, all are undone, and each half is tried alone.
    """
    kept = {parameter: parameter.to("cpu", copy=True) for a in lot for parameter in a.parameters}
    for activation in lot:
        _apply(activation, alpha)
    moved = check.moved()
    if moved < _TOLERANCE:
        return list(lot)
    for parameter, value in kept.items():
        parameter.copy_(value)
    if len(lot) == 1:
        left[lot[0].producer.name] = moved
        return []
    del kept
    middle = len(lot) // 2
    return [a for half in (lot[:middle], lot[middle:]) for a in _smooth_exactly(half, alpha, check, left)]


def _lots(activations: Sequence[Activation]) -> Iterator[list[Activation]]:
    """Runs of activations whose tensors have about 1 / _LOTS of all bytes."""
    sizes = [sum(parameter.nbytes for parameter in activation.parameters) for activation in activations]
    lot: list[Activation] = []
    filled, total = 0, sum(sizes)
    for activation, size in zip(activations, sizes, strict=True):
        lot.append(activation)
        filled += size
        if filled * _LOTS >= total:
            yield lot
            lot, filled = [], 0
    if lot:
        yield lot


def _summarize(seen: Observation, kept: list[Activation], left: dict[str, float], moved: float) -> Smoothed:
    def read_by(activations: Iterable[Activation]) -> set[int]:
        return {id(reader.parameter) for activation in activations for reader in activation.readers}

    smoothed, tried = read_by(kept), read_by(seen.activations)
    count = sum(any(id(weight) in smoothed for weight in readers.values()) for readers in seen.inputs)
    uncovered = [next(iter(r)) for r in seen.inputs if not any(id(weight) in tried for weight in r.values())]
    return Smoothed(len(seen.inputs), count, left, tuple(uncovered), moved)


def _log(model: nn.Module, result: Smoothed, alpha: float) -> None:
    text = str(result)
    if not result.smoothed:
        logger.warning(
            "%s continues without smoothing, which --smooth_alpha %g asks for: %s",
            type(model).__name__,
            alpha,
            text,
        )
        return
    log = logger.warning if result.left else logger.info
    log("%s; alpha %g; logits move by %.1e of the largest", text[0].upper() + text[1:], alpha, result.moved)


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    return batch["input_ids"].numel()


def _beginning(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first tokens of a batch of rows; whole where it has other tensors."""
    if any(value.ndim != 2 or value.shape != batch["input_ids"].shape for value in batch.values()):
        return batch
    return {key: value[:, :_CHECKED_TOKENS] for key, value in batch.items()}


def _apply(activation: Activation, alpha: float) -> None:
    ndim = activation.largest.ndim
    weight = torch.stack([_reduced(reader.largest(), ndim) for reader in activation.readers]).amax(0)
    factors = smoothing_factors(activation.by_output(activation.largest), activation.by_output(weight), alpha)
    activation.producer.divide(factors)
    for reader in activation.readers:
        reader.multiply(activation.by_channel(factors))


def _reduced(largest: torch.Tensor, ndim: int) -> torch.Tensor:
    """[..., K] -> [K] if `ndim` is 1: the largest of all experts, where one activation reaches all of them."""
    return largest.flatten(0, -2).amax(0) if largest.ndim > ndim else largest


def smoothing_factors(largest_input: torch.Tensor, largest_weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over their geometric mean, FP32 [..., channels]; see the top.

    1 where no channel was seen: of an expert that no token reached.
    """
    factors = largest_input.clamp(min=_SMALLEST) ** alpha / largest_weight.clamp(min=_SMALLEST) ** (1 - alpha)
    factors = factors / factors.log().mean(-1, keepdim=True).exp()
    return torch.where(largest_input.amax(-1, keepdim=True) > 0, factors, 1)
