"""Activations that smoothing can scale: what produces each one, which weights read it, how large its channels get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .producers import Producer


def as_it_is(weight: torch.Tensor) -> torch.Tensor:
    """The rows of a weight that has its channels last."""
    return weight


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that multiplies an activation; `rows` views the parameter as [..., N, K], the channels last."""

    parameter: torch.Tensor
    rows: Callable[[torch.Tensor], torch.Tensor] = as_it_is

    def largest(self) -> torch.Tensor:
        """Its largest magnitudes, FP32 [..., K]: over the N rows that multiply the same channels."""
        return torch.linalg.vector_norm(self.rows(self.parameter), torch.inf, dim=-2).float()

    def multiply(self, factors: torch.Tensor) -> None:
        """Multiply each channel by its factor: [K], or [..., K] where the matrices of a stack have their own."""
        self.rows(self.parameter).mul_(factors.unsqueeze(-2).to(self.parameter.dtype))


@dataclass(eq=False)
class Activation:
    """An activation: what produces it, the weights that read it, and its largest magnitudes, FP32 [channels].

    Within experts each has channels of its own: [E, channels].

    Grouped-query attention reads each head of v_proj several times, one copy after the other: then there are `copies`
    times as many channels as v_proj puts out, in runs of `head`.
    """

    producer: Producer
    readers: list[Reader]
    largest: torch.Tensor
    copies: int = 1
    head: int | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All that are changed when it is smoothed."""
        return [*self.producer.parameters, *(reader.parameter for reader in self.readers)]

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


def largest_of(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel of an activation [..., K], FP32 [K]."""
    return x.detach().abs().flatten(0, -2).amax(0).float()
