"""Run a model and see which weights read which activations.

What reads the output of a norm is seen while the model runs, not guessed from names: every quantized layer, and every
matrix that `torch.nn.functional.linear` multiplies by, such as a router's bare parameter. A reader may get a view of
the output, so outputs are recognized by their storage. The other producers have names that models share, see pairs.py.
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

from ..layers.experts import is_quantexperts, layout_of
from ..layers.sites import Site, quantized_sites, shared_parameters
from .activations import Activation, Reader, largest_of
from .pairs import Pair, find_pairs
from .producers import is_norm, norm_producer


@dataclass(frozen=True)
class Observation:
    """What was seen while a model ran.

    Attributes:
        activations: that can be smoothed and that a quantized layer reads.
        inputs: each distinct input of quantized layers, as the weights that read it, by the labels of their sites.
    """

    activations: list[Activation]
    inputs: list[dict[str, torch.Tensor]]


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
    shared = shared_parameters(model)
    found = [
        activation
        for activation in observer.activations()
        if any(id(reader.parameter) in quantized for reader in activation.readers)
        and not any(id(parameter) in shared for parameter in activation.parameters)
    ]
    return Observation(found, observer.inputs())


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
        self.model, self.sites, self.pairs = model, quantized_sites(model), list(find_pairs(model))
        self.parameters = {id(parameter): Reader(parameter) for parameter in model.parameters()}
        self.norms: dict[nn.Module, _Norm] = {}
        self.outputs: dict[StorageWeakRef, _Norm] = {}  # of a batch; a weak reference keeps an address from reuse
        self.first_input: dict[str, StorageWeakRef] = {}  # of each site
        self.largest: dict[Pair, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and len(args) > 1 and id(args[1]) in self.parameters:
            self._reads(args[0], self.parameters[id(args[1])])
        return func(*args, **(kwargs or {}))

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, module in self.model.named_modules():
            if is_norm(module):
                yield module.register_forward_hook(self._after_norm(name))
            if (layout := layout_of(module)) is not None and not (layout.is_routed and is_quantexperts(module)):
                first = Reader(module.get_parameter(layout.parameters[0]), layout.rows)
                # Rows that are not routed come with the router's scores already: their source is what the parent gets.
                called = module if layout.is_routed else self.model.get_submodule(name.rpartition(".")[0])
                yield called.register_forward_pre_hook(self._before(first))
        for site in self.sites:
            yield site.module.register_forward_pre_hook(self._before_site(site))
        for pair in self.pairs:
            yield pair.module.register_forward_pre_hook(self._before_pair(pair))

    def activations(self) -> Iterator[Activation]:
        for norm in self.norms.values():
            if norm.readers:
                yield Activation(norm_producer(norm.name, norm.module), list(norm.readers.values()), norm.largest)
        after_norms = {own for norm in self.norms.values() for own in norm.readers}
        for pair in self.pairs:  # some models have a norm between the two
            if pair in self.largest and id(pair.reader.parameter) not in after_norms:
                yield Activation(pair.producer, [pair.reader], self.largest[pair], pair.copies, pair.head)

    def inputs(self) -> list[dict[str, torch.Tensor]]:
        """Sites that read the same tensor have one input."""
        together: dict[StorageWeakRef, dict[str, torch.Tensor]] = {}
        for site in self.sites:
            if site.label in self.first_input:
                together.setdefault(self.first_input[site.label], {})[site.label] = site.weight
        return list(together.values())

    def _reads(self, x: torch.Tensor, reader: Reader) -> None:
        norm = self.outputs.get(StorageWeakRef(x.untyped_storage()))
        if norm is not None and x.shape[-1] == len(norm.largest):
            norm.readers.setdefault(id(reader.parameter), reader)

    def _after_norm(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.numel():
                return
            largest = largest_of(output)
            norm = self.norms.setdefault(module, _Norm(name, module, largest))
            norm.largest = torch.maximum(norm.largest, largest)
            self.outputs[StorageWeakRef(output.untyped_storage())] = norm

        return hook

    def _before(self, reader: Reader) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if args:
                self._reads(args[0], reader)

        return hook

    def _before_site(self, site: Site) -> Callable:
        reader = Reader(site.weight, site.module.rows)

        def hook(module: nn.Module, args: tuple) -> None:
            self.first_input.setdefault(site.label, StorageWeakRef(args[0].untyped_storage()))
            self._reads(args[0], reader)

        return hook

    def _before_pair(self, pair: Pair) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if args[0].numel():
                largest = pair.largest(*args)
                self.largest[pair] = torch.maximum(self.largest[pair], largest) if pair in self.largest else largest

        return hook
