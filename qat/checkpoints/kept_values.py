"""Which rules of weights give a packed model's values back, when QAT rounds them again at its first step.

Packed values lie on a grid, but a rule derives the scale of a block from the largest value in it, which may be another
scale than that in the file. A tuner may leave a block of MXFP8 whose largest element is 240: FLOOR reads it as 480 of
the next finer scale, which saturates at 448. INT4's absmax takes the largest magnitude for 7.5 steps, and in a packed
block it is 7 or 8 of them. Some other rule often takes the scale of the file:

    rceil   (MX) the finest scale that saturates nothing. The packed scale saturates nothing, so this is it or a finer
            one, on which every packed value lies as well: exact, whoever packed.
    search  (INT4) tries 7 and 8 steps, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..layers.fused import fused_groups
from ..layers.learned_scales import SETTING
from ..numerics import ops
from ..numerics.formats import Format
from ..schemes.config import QATConfig
from ..schemes.presets import get_scheme
from ..schemes.spec import VIEW_DTYPE

logger = logging.getLogger(__name__)
_FIRST_TRIED = ("rceil", "search")


@dataclass
class Moved:
    """How far the weights in one format move when a rule rounds them again.

    Attributes:
        layers, elements: how many change.
        change, norm: sums of squares of the changes, and of all weights.
    """

    layers: int = 0
    elements: int = 0
    change: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        """The root mean square of the changes over that of the weights."""
        return (self.change / self.norm) ** 0.5 if self.norm else 0.0


def keep_values(model: nn.Module, found: Mapping[str, Format], config: QATConfig, is_ours: bool) -> QATConfig:
    """`config`, its weight rules changed where they would change the packed values and others do so far less.

    What moves in spite of that is logged.

    Args:
        model: with the packed values as weights.
        found: formats by layer.
        is_ours: whether this program trained it; a run must resume under the rule it was trained with.
    """
    if config.training.get(SETTING):  # layers compute with the values as they are
        return config
    chosen: dict[str, str] = {}
    rules = {get_scheme(name).weight.format.name: rule["weight"] for name, rule in config.scale_rules.items()}
    for fmt in dict.fromkeys(found.values()):
        layers = [name for name, other in found.items() if other == fmt]
        elements = sum(model.get_parameter(f"{name}.weight").numel() for name in layers)
        rule = rules.get(fmt.name) or fmt.rules[0]
        moved = move(model, layers, fmt, rule)
        if not moved.elements:
            continue
        best, least = _best(model, layers, fmt, rule, moved)
        text = (
            f"{moved.elements} of {elements} packed elements in {moved.layers} of {len(layers)} layers "
            f"({100 * moved.elements / elements:.3f} %) change when rounded again in {fmt.name} under {rule}, the rule "
            f"of the folder, by {100 * moved.relative:.3g} % of the weights' root mean square"
        )
        keeps = "keeps them" if not least.elements else f"changes {least.elements}, by {100 * least.relative:.3g} %"
        if best == rule:
            logger.warning("%s; no other rule halves that", text)
        elif is_ours:
            logger.warning("%s; --quant_scheme with --weight_scale_rule %s %s", text, best, keeps)
        else:
            logger.warning("%s; without --quant_scheme they are rounded under %s, which %s", text, best, keeps)
            chosen[fmt.name] = best
    scale_rules = {
        name: {**rule, "weight": chosen.get(get_scheme(name).weight.format.name, rule["weight"])}
        for name, rule in config.scale_rules.items()
    }
    return replace(config, scale_rules=scale_rules)


def _best(model: nn.Module, layers: list[str], fmt: Format, rule: str, moved: Moved) -> tuple[str, Moved]:
    """The rule under which the weights move least, and how far; `rule` itself unless another halves the distance."""
    best, least = rule, moved
    for other in sorted(set(fmt.rules) - {rule}, key=lambda name: (name not in _FIRST_TRIED, fmt.rules.index(name))):
        tried = move(model, layers, fmt, other)
        if tried.relative <= moved.relative / 2 and tried.change < least.change:
            best, least = other, tried
        if not least.elements:
            break
    return best, least


@torch.no_grad()
def move(model: nn.Module, layers: list[str], fmt: Format, rule: str) -> Moved:
    """How far the weights of `layers`, which have the format, move when they are rounded under `rule`."""
    moved = Moved()
    for weight, divisor in _weights(model, layers, fmt):
        rounded = ops.fake_quantize(weight, fmt.name, rule, VIEW_DTYPE, *divisor)
        count = int((rounded != weight).sum())
        moved.layers += count > 0
        moved.elements += count
        moved.norm += float(weight.float().square().sum())
        if count:
            moved.change += float((rounded.float() - weight.float()).square().sum())
    return moved


def _weights(model: nn.Module, layers: list[str], fmt: Format) -> Iterator[tuple[torch.Tensor, tuple]]:
    """Weights, each with its divisor in formats that have one: that of all layers which engines fuse."""
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in layers}
    if fmt.tensor_scale is None:
        yield from ((weight, ()) for weight in weights.values())
        return
    groups = list(fused_groups(layers))
    groups += [[name] for name in layers if not any(name in group for group in groups)]
    for group in groups:
        divisor = ops.tensor_divisor([weights[name] for name in group], fmt.name, VIEW_DTYPE)
        yield from ((weights[name], (divisor,)) for name in group)
