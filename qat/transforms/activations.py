"""Activations that smoothing can scale: what produces each one, which weights read it, how large its channels get.

What reads the output of a norm is seen while the model runs, not guessed from names: every quantized layer, and every
matrix that `torch.nn.functional.linear` multiplies by, such as a router's bare parameter. A reader may get a view of the
output, so outputs are recognized by their storage. The other producers have names that models share: `v_proj` before
`o_proj`, and `up_proj` before `down_proj` beside a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..layers.sites import Site, quantized_sites
from .producers import Producer, is_norm, linear_producer, norm_producer

# Producer, reader, and what must stand beside them: without a gate, the output of up_proj goes through a function that
# is not linear in it.
_PAIRS = (("v_proj", "o_proj", None), ("up_proj", "down_proj", "gate_proj"))


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that multiplies an activation; `rows` views the parameter as [..., N, K], the channels last."""

    parameter: nn.Parameter
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight

    def largest(self) -> torch.Tensor:
        """Its largest magnitudes, FP32 [..., K]: over the N rows that multiply the same channels."""
        return torch.linalg.vector_norm(self.rows(self.parameter), torch.inf, dim=-2).float()

    def multiply(self, factors: torch.Tensor) -> None:
        """Multiply each channel by its factor: [K], or [..., K] with factors of their own for the matrices of a stack."""
        self.rows(self.parameter).mul_(factors.unsqueeze(-2).to(self.parameter.dtype))


@dataclass
class Activation:
    """An activation: what produces it, the weights that read it, and its largest magnitudes, FP32 [channels].

    Grouped-query attention reads each head of v_proj several times, one copy after the other: then there are `copies`
    times as many channels as v_proj puts out, in runs of `head`.
    """

    producer: Producer
    readers: list[Reader]
    largest: torch.Tensor
    copies: int = 1
    head: int | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
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


@dataclass(frozen=True)
class Observation:
    """What was seen while a model ran.

    Attributes:
        activations: that can be smoothed and that a quantized layer reads.
        inputs: each distinct input of quantized layers, as the weights that read it, by their labels.
    """

    activations: list[Activation]
    inputs: list[dict[str, nn.Parameter]]


def observe(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Observation:
    """Run a prepared model, its quantizers off, and find its activations."""
    observer = _Observer(model)
    handles = list(observer.hooks())
    try:
        with observer:
            for batch in tqdm(batches, desc="Smoothing", unit="sample"):
                model(**batch)
                observer.outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    quantized = {id(site.weight) for site in observer.sites}
    shared = _shared_parameters(model)
    found = [
        activation
        for activation in observer.activations()
        if any(id(reader.parameter) in quantized for reader in activation.readers)
        and not any(parameter in shared for parameter in activation.parameters)
    ]
    return Observation(found, observer.inputs())


@dataclass(frozen=True, eq=False)
class _Pair:
    producer: Producer
    module: nn.Module
    reader: Reader
    copies: int
    head: int | None


@dataclass
class _Norm:
    """A norm whose output was seen."""

    name: str
    module: nn.Module
    largest: torch.Tensor
    readers: dict[int, Reader] = field(default_factory=dict)  # by id of their parameter


class _Observer(TorchFunctionMode):
    """Hooks, and a mode that sees each call of `torch.nn.functional.linear`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sites = model, quantized_sites(model)
        self.parameters = {id(parameter): Reader(parameter) for parameter in model.parameters()}
        self.norms: dict[nn.Module, _Norm] = {}
        self.outputs: dict[StorageWeakRef, _Norm] = {}  # of a batch; a weak reference keeps an address from reuse
        self.first_input: dict[str, StorageWeakRef] = {}  # of each site
        self.pairs = list(_pairs(model))
        self.largest: dict[_Pair, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and len(args) > 1:
            self._reads(args[0], self.parameters.get(id(args[1])))
        return func(*args, **(kwargs or {}))

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, module in self.model.named_modules():
            if is_norm(module):
                yield module.register_forward_hook(self._after_norm(name))
        for site in self.sites:
            yield site.module.register_forward_pre_hook(self._before_site(site))
        for pair in self.pairs:
            yield pair.module.register_forward_pre_hook(self._before_pair(pair))

    def activations(self) -> Iterator[Activation]:
        for norm in self.norms.values():
            if norm.readers:
                yield Activation(norm_producer(norm.name, norm.module), list(norm.readers.values()), norm.largest)
        for pair in self.pairs:
            if pair in self.largest:
                yield Activation(pair.producer, [pair.reader], self.largest[pair], pair.copies, pair.head)

    def inputs(self) -> list[dict[str, nn.Parameter]]:
        """Sites that read the same tensor have one input."""
        together: dict[StorageWeakRef, dict[str, nn.Parameter]] = {}
        for site in self.sites:
            if site.tensor in self.first_input:
                together.setdefault(self.first_input[site.tensor], {})[site.tensor] = site.weight
        return list(together.values())

    def _reads(self, x: torch.Tensor, reader: Reader | None) -> None:
        norm = self.outputs.get(StorageWeakRef(x.untyped_storage()))
        if reader is not None and norm is not None and x.shape[-1] == len(norm.largest):
            norm.readers.setdefault(id(reader.parameter), reader)

    def _after_norm(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.numel():
                return
            largest = _channels(output)
            norm = self.norms.setdefault(module, _Norm(name, module, largest))
            norm.largest = torch.maximum(norm.largest, largest)
            self.outputs[StorageWeakRef(output.untyped_storage())] = norm

        return hook

    def _before_site(self, site: Site) -> Callable:
        reader = Reader(site.weight)

        def hook(module: nn.Module, args: tuple) -> None:
            self.first_input.setdefault(site.tensor, StorageWeakRef(args[0].untyped_storage()))
            self._reads(args[0], reader)

        return hook

    def _before_pair(self, pair: _Pair) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            largest = _channels(args[0])
            self.largest[pair] = torch.maximum(self.largest[pair], largest) if pair in self.largest else largest

        return hook


def _channels(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel, FP32 [K]."""
    return x.detach().abs().flatten(0, -2).amax(0).float()


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    """v_proj and up_proj, whose outputs reach the next linear layer through operations that are linear in them."""
    for name, module in model.named_modules():
        for first, second, beside in _PAIRS:
            producer, reader = getattr(module, first, None), getattr(module, second, None)
            if not (isinstance(producer, nn.Linear) and isinstance(reader, nn.Linear)):
                continue
            if beside is not None and not hasattr(module, beside):
                continue
            copies, rest = divmod(reader.in_features, producer.out_features)
            head = getattr(module, "head_dim", None)
            if rest == 0 and (copies == 1 or head is not None):
                yield _Pair(linear_producer(f"{name}.{first}", producer), reader, Reader(reader.weight), copies, head)


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    seen: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if parameter in seen else seen).add(parameter)
    return shared
