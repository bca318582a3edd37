"""Smoothing: make activations easier to quantize before training begins, without changing what the model computes.

An MX block shares one scale, so a channel of large activations makes the 31 others beside it coarse; weights have no
such channels. SmoothQuant (Xiao et al., arXiv:2211.10438) divides each channel of an activation by a factor and
multiplies the weights that read it by the same factor:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)          alpha 0: no smoothing of X; alpha 1: all channels of X alike

The division costs nothing, since whatever produces the activation absorbs it: the norm before q/k/v or gate/up, v_proj
before o_proj, up_proj before down_proj. Which linear layers read a norm is seen while the model runs, not guessed from
names. The factors of a group have a geometric mean of 1.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..layers.quant_linear import is_quantlinear
from ..layers.sites import quantizers_off

logger = logging.getLogger(__name__)

_SMALLEST = 1e-5  # maxima are taken to be at least this: a dead channel needs no factor
_TOLERANCE = 1e-3  # of the largest logit: rounding of FP32 is far below, a broken model far above
_PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


@dataclass
class _Group:
    """An activation: what produces it, the linear layers that read it, and its largest magnitudes, FP32 [channels].

    Grouped-query attention reads each head of v_proj several times, one copy after the other: then there are `copies`
    times as many channels as v_proj puts out, in runs of `head`.
    """

    producer: nn.Module
    readers: list[nn.Linear]
    largest: torch.Tensor
    copies: int = 1
    head: int | None = None

    def by_output(self, channels: torch.Tensor) -> torch.Tensor:
        """The largest value over all copies of each of the producer's outputs."""
        if self.copies == 1:
            return channels
        assert self.head is not None
        return channels.view(-1, self.copies, self.head).amax(1).flatten()

    def by_channel(self, outputs: torch.Tensor) -> torch.Tensor:
        """A value for each of the producer's outputs, copied as the outputs are."""
        if self.copies == 1:
            return outputs
        assert self.head is not None
        return outputs.view(-1, 1, self.head).expand(-1, self.copies, -1).flatten()


@torch.no_grad()
def smooth(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], alpha: float) -> int:
    """Smooth the inputs of the QuantLinear layers of `model` in place; returns the number of smoothed activations.

    Args:
        model: prepared by `prepare_qat`, its weights FP32 for exactness.
        batches: what the model is called with, on its device and without padding; the first one also serves to check
            that the model still computes the same.
        alpha: migration strength (SmoothQuant): how much of the outliers moves from activations into weights;
            above 0 and at most 1.

    Raises:
        UserError: alpha out of range, nothing to smooth, or a model that does not compute the same afterwards.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"smoothing alpha {alpha} is out of range; choose a number above 0 and at most 1, such as 0.7")
    batches = list(batches)
    was_training = model.training
    model.eval()
    try:
        with quantizers_off(model):
            before = model(**batches[0]).logits
            groups = _observe(model, batches)
            if not groups:
                raise UserError(
                    f"{type(model).__name__} has no activation that could be smoothed: no norm, v_proj or up_proj "
                    "whose output is read by quantized linear layers; leave smoothing off (alpha 0)"
                )
            for group in groups:
                _apply(group, alpha)
            after = model(**batches[0]).logits
    finally:
        model.train(was_training)
    moved = float((after - before).abs().max() / before.abs().max())
    if not moved < _TOLERANCE:
        raise UserError(
            f"smoothing changes what {type(model).__name__} computes (logits move by {moved:.2g} of the largest), so "
            "one of its activations is used in a way that is not known here; leave smoothing off (alpha 0)"
        )
    logger.info("Smoothed %d activations, alpha %g; logits move by %.1e of the largest", len(groups), alpha, moved)
    return len(groups)


def _observe(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[_Group]:
    """Run the model and see which linear layers read which norm, and how large the channels of their inputs get."""
    readers: dict[nn.Module, list[nn.Linear]] = {}
    largest: dict[nn.Module, torch.Tensor] = {}
    producers: dict[int, tuple] = {}  # id of an output -> its norm, and a weak reference that tells ids used again

    def after_norm(norm, _args, output):
        producers[id(output)] = norm, weakref.ref(output)

    def before_linear(linear, args):
        x = args[0]
        channels = x.detach().abs().flatten(0, -2).amax(0).float()
        largest[linear] = torch.maximum(largest[linear], channels) if linear in largest else channels
        norm, output = producers.get(id(x), (None, None))
        if norm is not None and output() is x and linear not in readers.setdefault(norm, []):
            readers[norm].append(linear)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(before_linear))
        elif _is_norm(module):
            handles.append(module.register_forward_hook(after_norm))
    try:
        for batch in tqdm(batches, desc="Smoothing", unit="sample"):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    groups = [_Group(norm, linear, largest[linear[0]]) for norm, linear in readers.items()]
    groups += _pairs(model, largest)
    shared = _shared_parameters(model)
    return [g for g in groups if any(map(is_quantlinear, g.readers)) and not any(r.weight in shared for r in g.readers)]


def _pairs(model: nn.Module, largest: dict[nn.Module, torch.Tensor]) -> Iterator[_Group]:
    """v_proj and up_proj, whose outputs reach the next linear layer through operations that are linear in them."""
    for module in model.modules():
        for first, second in _PAIRS:
            producer, reader = getattr(module, first, None), getattr(module, second, None)
            if not (isinstance(producer, nn.Linear) and isinstance(reader, nn.Linear) and reader in largest):
                continue
            copies, rest = divmod(reader.in_features, producer.out_features)
            head = getattr(module, "head_dim", None)
            if rest == 0 and (copies == 1 or head is not None):
                yield _Group(producer, [reader], largest[reader], copies, head)


def _is_norm(module: nn.Module) -> bool:
    """A module of its own with one scale per channel and perhaps one offset: LayerNorm, RMSNorm and their kin."""
    parameters = dict(module.named_parameters())
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.ndim == 1 for p in parameters.values())


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    seen: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if parameter in seen else seen).add(parameter)
    return shared


def _apply(group: _Group, alpha: float) -> None:
    weight = torch.stack([reader.weight.abs().amax(0).float() for reader in group.readers]).amax(0)
    factors = smoothing_factors(group.by_output(group.largest), group.by_output(weight), alpha)
    _divide_output(group.producer, factors)
    for reader in group.readers:
        reader.weight.mul_(group.by_channel(factors).to(reader.weight.dtype))


def smoothing_factors(largest_input: torch.Tensor, largest_weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over their geometric mean, FP32 [channels]; see the top."""
    factors = largest_input.clamp(min=_SMALLEST) ** alpha / largest_weight.clamp(min=_SMALLEST) ** (1 - alpha)
    return factors / factors.log().mean().exp()


def _divide_output(producer: nn.Module, factors: torch.Tensor) -> None:
    """Let what `producer` puts out be divided by `factors` [channels]."""
    if isinstance(producer, nn.Linear):
        producer.weight.div_(factors[:, None].to(producer.weight.dtype))
    else:
        weight, offset = producer.get_parameter("weight"), _weight_offset(producer)
        weight.copy_((weight + offset) / factors - offset)
    bias: torch.Tensor | None = getattr(producer, "bias", None)
    if bias is not None:
        bias.div_(factors.to(bias.dtype))


def _weight_offset(norm: nn.Module) -> float:
    """0 where a norm multiplies by its weight, 1 where it multiplies by 1 + weight, as Gemma's do."""
    weight = norm.get_parameter("weight")
    kept = weight.clone()
    x = torch.randn(1, 1, kept.numel(), device=kept.device, dtype=kept.dtype)
    weight.zero_()
    bias: torch.Tensor | None = getattr(norm, "bias", None)
    offset = float((norm(x) - (0 if bias is None else bias)).abs().max() > 0)
    weight.copy_(kept)
    return offset
