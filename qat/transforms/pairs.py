"""Pairs of products, the second linear in what the first puts out: v_proj and o_proj, up_proj and down_proj.

They are known by names that models share. What a name promises and a model does not keep shows in its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..layers.expert_function import Routing
from ..layers.experts import ExpertProjection, QuantExperts
from .activations import Reader, largest_of
from .producers import Producer, linear_producer, up_producer

# Producer, reader, and what must stand beside them: without a gate, the output of up_proj goes through a function that
# is not linear in it.
_NAMES = (("v_proj", "o_proj", None), ("up_proj", "down_proj", "gate_proj"))


@dataclass(frozen=True, eq=False)
class Pair:
    """Two products, the second of what the first puts out.

    Attributes:
        producer: the first.
        module: that is called with the activation.
        reader: the weight of the second.
        largest: of what `module` is called with, FP32 [channels], within experts [E, channels].
        copies, head: see `Activation`.
    """

    producer: Producer
    module: nn.Module
    reader: Reader
    largest: Callable[..., torch.Tensor] = largest_of
    copies: int = 1
    head: int | None = None


def find_pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs of a prepared model, in its order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            yield from _within_experts(name, module)
        else:
            yield from _linear(name, module)


def _linear(name: str, module: nn.Module) -> Iterator[Pair]:
    for first, second, beside in _NAMES:
        producer, reader = getattr(module, first, None), getattr(module, second, None)
        if not (isinstance(producer, nn.Linear) and isinstance(reader, nn.Linear)):
            continue
        if beside is not None and not hasattr(module, beside):
            continue
        copies, rest = divmod(reader.in_features, producer.out_features)
        head = getattr(module, "head_dim", None)
        if rest == 0 and (copies == 1 or head is not None):
            absorbs = linear_producer(f"{name}.{first}", producer)
            yield Pair(absorbs, reader, Reader(reader.weight), copies=copies, head=head)


def _within_experts(name: str, experts: QuantExperts) -> Iterator[Pair]:
    """up and down of each expert; where gate and up are interleaved (gpt-oss), the gate adds 1 to up."""
    if experts.layout.has_gate and not experts.layout.is_interleaved:
        down = experts.projections[experts.layout.parameters[1]]
        assert isinstance(down, ExpertProjection)
        reader = Reader(down.effective_weight(), down.rows)
        yield Pair(up_producer(name, experts, experts.layout), down, reader, _largest_by_expert)


def _largest_by_expert(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The largest magnitude of each channel over the rows of each expert, FP32 [E, K]; 0 where it has none."""
    largest = torch.zeros(len(routing.offsets), x.shape[-1], device=x.device)
    experts = routing.experts.unsqueeze(-1).expand_as(x)
    return largest.scatter_reduce_(0, experts, x.detach().abs().float(), "amax")
