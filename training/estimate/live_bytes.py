"""LiveBytes: how many bytes of tensors exist while operators run, as an allocator would count them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BASE, WORK, GRADIENT = "base", "work", "gradient"


@dataclass(frozen=True)
class Moment:
    """Bytes that exist at one time, beside the base: gradients that are complete, and everything else."""

    work: int = 0
    gradients: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operators return, from their first sight until they are freed.

    A storage counts once, however many views it has. Memory that a kernel takes and frees inside is not seen.

    Args:
        gradient_weight: of a byte of a complete gradient when peaks are compared; 1 / n where n processes share it.

    Attributes:
        phase: peaks are kept for each phase.
        peaks: the moment of each phase at which most was there.
    """

    def __init__(self, gradient_weight: float = 1.0) -> None:
        super().__init__()
        self.gradient_weight = gradient_weight
        self.phase, self.adds_in_place = BASE, False
        self.peaks: dict[str, Moment] = {}
        self._bytes = {BASE: 0, WORK: 0, GRADIENT: 0}
        self._kinds: dict[int, str] = {}
        self._references: dict[int, weakref.ref] = {}

    @property
    def base(self) -> int:
        """Bytes that were there before the first phase and still are."""
        return self._bytes[BASE]

    @property
    def now(self) -> Moment:
        """What exists now."""
        return Moment(self._bytes[WORK], self._bytes[GRADIENT])

    def begin(self, phase: str, adds_in_place: bool = False) -> None:
        """Keep peaks for `phase` from now on.

        Args:
            adds_in_place: a sum takes the place of its first operand. In the backward pass, autograd adds gradients of
                a tensor that is used twice (a tied embedding, the residual stream) in place, but not fake ones.
        """
        self.phase, self.adds_in_place = phase, adds_in_place
        self._compare()

    def settle(self, gradient: torch.Tensor) -> None:
        """Count the storage of a complete gradient as one."""
        key = id(gradient.untyped_storage())
        if self._kinds.get(key) == WORK:
            size = gradient.untyped_storage().nbytes()
            self._bytes[WORK] -= size
            self._bytes[GRADIENT] += size
            self._kinds[key] = GRADIENT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, self.adds_in_place and func is torch.ops.aten.add.Tensor)
        return output

    def _see(self, tensor: torch.Tensor, in_place: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._kinds:
            return
        self._kinds[key] = BASE if self.phase == BASE else WORK
        self._bytes[self._kinds[key]] += size
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        if not in_place:
            self._compare()

    def _forget(self, key: int, size: int) -> None:
        self._bytes[self._kinds.pop(key)] -= size
        del self._references[key]

    def _compare(self) -> None:
        highest = self.peaks.setdefault(self.phase, Moment())
        if self._weighted(self.now) > self._weighted(highest):
            self.peaks[self.phase] = self.now

    def _weighted(self, moment: Moment) -> float:
        return moment.work + moment.gradients * self.gradient_weight
