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
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..layers.fused import fused_groups
from ..layers.learned_scales import SETTING
from ..numerics import ops
from ..numerics.formats import Format
from ..schemes.config import QATConfig
from ..schemes.presets import get_scheme
from ..schemes.spec import VIEW_DTYPE
from .layouts import PackedLayer, dequantized_rows

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


@dataclass(frozen=True)
class PackedRows:
    """The weights of packed layers, dequantized one by one: all of a model at once may not fit beside the model.

    Attributes:
        layers: by name.
        tensors_of: reads the tensors of a layer.
    """

    layers: Mapping[str, PackedLayer]
    tensors_of: Callable[[str], Mapping[str, torch.Tensor]]

    def of(self, name: str) -> torch.Tensor:
        """BF16 [N, K]."""
        return dequantized_rows(self.layers[name], self.tensors_of(name))


def keep_values(packed: PackedRows, config: QATConfig, is_ours: bool) -> QATConfig:
    """`config`, its weight rules changed where they would change the packed values and others do so far less.

    What moves in spite of that is logged.

    Args:
        packed: the weights.
        is_ours: whether this program trained it; a run must resume under the rule it was trained with.
    """
    if config.training.get(SETTING):  # layers compute with the values as they are
        return config
    chosen: dict[str, str] = {}
    rules = {get_scheme(name).weight.format.name: rule["weight"] for name, rule in config.scale_rules.items()}
    for fmt in dict.fromkeys(layer.format for layer in packed.layers.values()):
        layers = [name for name, layer in packed.layers.items() if layer.format == fmt]
        elements = sum(math.prod(packed.layers[name].shape) for name in layers)
        rule = rules.get(fmt.name) or fmt.rules[0]
        moved = move(packed, layers, fmt, rule)
        if not moved.elements:
            continue
        best, least = _best(packed, layers, fmt, rule, moved)
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


def _best(packed: PackedRows, layers: list[str], fmt: Format, rule: str, moved: Moved) -> tuple[str, Moved]:
    """The rule under which the weights move least, and how far; `rule` itself unless another halves the distance."""
    best, least = rule, moved
    for other in sorted(set(fmt.rules) - {rule}, key=lambda name: (name not in _FIRST_TRIED, fmt.rules.index(name))):
        tried = move(packed, layers, fmt, other)
        if tried.relative <= moved.relative / 2 and tried.change < least.change:
            best, least = other, tried
        if not least.elements:
            break
    return best, least


@torch.no_grad()
def move(packed: PackedRows, layers: list[str], fmt: Format, rule: str) -> Moved:
    """How far the weights of `layers`, which have the format, move when they are rounded under `rule`."""
    moved = Moved()
    for weight, divisor in _weights(packed, layers, fmt):
        rounded = ops.fake_quantize(weight, fmt.name, rule, VIEW_DTYPE, *divisor)
        count = int((rounded != weight).sum())
        moved.layers += count > 0
        moved.elements += count
        moved.norm += float(weight.float().square().sum())
        if count:
            moved.change += float((rounded.float() - weight.float()).square().sum())
    return moved


def _weights(packed: PackedRows, layers: list[str], fmt: Format) -> Iterator[tuple[torch.Tensor, tuple]]:
    """Weights, each with its divisor in formats that have one: that of all layers which engines fuse."""
    if fmt.tensor_scale is None:
        yield from ((packed.of(name), ()) for name in layers)
        return
    groups = [*fused_groups(layers), *_halves_of_experts(layers)]
    fused = {name for group in groups for name in group}
    for group in (*groups, *([name] for name in layers if name not in fused)):
        weights = [packed.of(name) for name in group]
        divisor = ops.tensor_divisor(weights, fmt.name, VIEW_DTYPE)
        yield from ((weight, (divisor,)) for weight in weights)


def _halves_of_experts(layers: Iterable[str]) -> Iterator[list[str]]:
    """Gate and up of an expert where they are called w1 and w3."""
    known = set(layers)
    for name in layers:
        parent, _, own = name.rpartition(".")
        if own == "w1" and parent.rpartition(".")[2].isdigit() and f"{parent}.w3" in known:
            yield [name, f"{parent}.w3"]
