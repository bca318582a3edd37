"""Smoothing: make activations easier to quantize before training begins, without changing what the model computes.

An MX block shares one scale, so a channel of large activations makes the 31 others beside it coarse; weights have no
such channels. SmoothQuant (Xiao et al., arXiv:2211.10438) divides each channel of an activation by a factor and
multiplies the weights that read it by the same factor:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)          alpha 1: all channels of X alike

The division costs nothing, since whatever produces the activation absorbs it: the norm before q/k/v or gate/up, v_proj
before o_proj, up_proj before down_proj (observation.py finds them). The factors of an activation have a geometric mean
of 1. The strength alpha is one number for the whole model, or each activation's own (strength.py).

Some models use an activation in a way that is not seen, as a residual or through a function that is not linear. Their
logits move; the activation is undone, and the others stay smoothed.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..layers.sites import quantizers_off
from .activations import Activation
from .equality import Equality
from .factors import apply_factors, factors_of
from .observation import Observation, observe
from .strength import AUTO, BETA, OF_EXPERTS, best_strengths, read_by_experts

logger = logging.getLogger(__name__)

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
        strengths: how many of the activations have each alpha; 0 of those that are best left as they are.
        of_experts: how many of the activations quantized experts read, where alpha is "auto"; theirs is `OF_EXPERTS`,
            and they are not among `strengths`.
    """

    inputs: int
    smoothed: int
    left: dict[str, float]
    uncovered: tuple[str, ...]
    moved: float
    strengths: dict[float, int]
    of_experts: int = 0

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
def smooth(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    alpha: float | str,
    agreed: Callable[[list[float]], list[float]] | None = None,
) -> Smoothed:
    """Smooth the inputs of the quantized layers of `model` in place, except those that would move its logits.

    Args:
        model: prepared by `prepare_qat`, its weights FP32 for exactness.
        batches: what the model is called with, on its device and without padding; the beginning of the longest one also
            serves to check that the model still computes the same.
        alpha: migration strength (SmoothQuant): how much of the outliers moves from activations into weights;
            above 0 and at most 1. "auto" chooses one for each activation that linear layers alone read, see
            strength.py.
        agreed: gives processes that smooth the same model the same choice of "auto" from their own.

    Returns:
        What was smoothed and what was not, which is also logged: as a warning where the logits would have moved, or
        where nothing is smoothed.

    Raises:
        UserError: alpha is out of range, or there is no batch.
    """
    if alpha != AUTO and (isinstance(alpha, str) or not 0 < alpha <= 1):
        raise UserError(
            f"smoothing alpha {alpha} is out of range; choose a number above 0 and at most 1, such as 0.7, or {AUTO}"
        )
    batches = list(batches)
    if not batches:
        raise UserError("smoothing needs at least one sample; give more data, or leave smoothing off (alpha 0)")
    was_training = model.training
    model.eval()
    try:
        with quantizers_off(model), _without_cache(model):
            check = Equality(model, _beginning(max(batches, key=_tokens)))
            seen = observe(model, batches)
        fixed = read_by_experts(model, seen.activations) if alpha == AUTO else []
        with _without_cache(model):
            exponents = _exponents(model, batches, seen.activations, alpha, fixed, agreed)
        with quantizers_off(model), _without_cache(model):
            left: dict[str, float] = {}
            lots = _lots([activation for activation, own in exponents.items() if any(own)])
            kept = [a for lot in lots for a in _smooth_exactly(lot, exponents, check, left)]
            chosen = Counter(o[0] for a, o in exponents.items() if a not in fixed and (a in kept or not any(o)))
            moved, of_experts = check.moved() if kept else 0.0, sum(a in kept for a in fixed)
            result = _summarize(seen, kept, left, moved, dict(sorted(chosen.items())), of_experts)
    finally:
        model.train(was_training)
    _log(model, result, alpha)
    return result


def _exponents(
    model: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    activations: Sequence[Activation],
    alpha: float | str,
    fixed: Sequence[Activation],
    agreed: Callable[[list[float]], list[float]] | None,
) -> dict[Activation, tuple[float, float]]:
    """alpha and beta of each activation's factors, see factors.py; `fixed` are those that "auto" does not choose."""
    same = OF_EXPERTS if isinstance(alpha, str) else alpha
    exponents = dict.fromkeys(activations, (same, 1 - same))
    if isinstance(alpha, str) and (linear := [a for a in activations if a not in fixed]):
        chosen = best_strengths(model, batches, linear)
        chosen = chosen if agreed is None else agreed(chosen)
        exponents |= {activation: (own, BETA) for activation, own in zip(linear, chosen, strict=True)}
    return exponents


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
    lot: Sequence[Activation], exponents: dict[Activation, tuple[float, float]], check: Equality, left: dict[str, float]
) -> list[Activation]:
    """Smooth those of a lot that do not move the logits, which are returned; the others go into `left`.

    All are smoothed, and the logits are compared once; where they moved, all are undone, and each half is tried alone.
    """
    kept = {parameter: parameter.to("cpu", copy=True) for a in lot for parameter in a.parameters}
    for activation in lot:
        apply_factors(activation, factors_of(activation, *exponents[activation]))
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
    return [a for half in (lot[:middle], lot[middle:]) for a in _smooth_exactly(half, exponents, check, left)]


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


def _summarize(
    seen: Observation,
    kept: list[Activation],
    left: dict[str, float],
    moved: float,
    strengths: dict[float, int],
    of_experts: int,
) -> Smoothed:
    def read_by(activations: Iterable[Activation]) -> set[int]:
        return {id(reader.parameter) for activation in activations for reader in activation.readers}

    smoothed, tried = read_by(kept), read_by(seen.activations)
    count = sum(any(id(weight) in smoothed for weight in readers.values()) for readers in seen.inputs)
    uncovered = [next(iter(r)) for r in seen.inputs if not any(id(weight) in tried for weight in r.values())]
    return Smoothed(len(seen.inputs), count, left, tuple(uncovered), moved, strengths, of_experts)


def _log(model: nn.Module, result: Smoothed, alpha: float | str) -> None:
    text, name = str(result), type(model).__name__
    parts = [f"{own:g} x {count}" for own, count in result.strengths.items()]
    parts += [f"{OF_EXPERTS:g} x {result.of_experts} that experts read"] if result.of_experts else []
    chosen = ", ".join(parts)
    text += f"; alpha {f'{AUTO}: {chosen}' if alpha == AUTO and chosen else alpha}"
    if not result.smoothed:
        logger.warning("%s continues without smoothing, which --smooth_alpha %s asks for: %s", name, alpha, text)
        return
    log = logger.warning if result.left else logger.info
    log("%s; logits move by %.1e of the largest", text[0].upper() + text[1:], result.moved)


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    return batch["input_ids"].numel()


def _beginning(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first tokens of a batch of rows; whole where it has other tensors."""
    if any(value.ndim != 2 or value.shape != batch["input_ids"].shape for value in batch.values()):
        return batch
    return {key: value[:, :_CHECKED_TOKENS] for key, value in batch.items()}
