"""Second moments of the inputs of quantized layers, as these are rounded before the product.

Each token counts alike: its input is divided by its norm. In some layers the inputs of a text's first tokens are ten
times larger and more, and the sum of plain squares would be of these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm import tqdm

from ..layers.kv_cache import cache_quantizers
from ..layers.operands import compute_dtype
from ..layers.sites import EXPERTS, Site, disabled, quantized_sites, shared_parameters
from ..layers.transform import transformed_input

_Hook = Callable[[nn.Module, tuple, dict], None]
MEMORY = 4 << 30  # bytes of moments that are summed up at once; more layers take more passes over the samples


def linear_sites(model: nn.Module) -> list[Site]:
    """The sites of a prepared model with a weight of their own that is rounded, one for all tokens: no experts."""
    shared = shared_parameters(model)
    sites = [site for site in quantized_sites(model) if site.kind != EXPERTS.name and id(site.weight) not in shared]
    return [site for site in sites if site.module.weight_quantizer.is_enabled]


@torch.no_grad()
def groups_of(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], sites: Sequence[Site]) -> list[list[Site]]:
    """Those of the sites that batches reach, in the order of their calls; sites with the same rounded input together.

    No more batches are read when all sites are reached.
    """
    seen: dict[tuple, list[Site]] = {}
    reached: set[str] = set()
    calls = 0
    alive = []  # inputs, which keep their addresses from reuse

    def hook(site: Site) -> _Hook:
        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if site.label in reached:  # a layer that is called twice belongs to its first input
                return
            reached.add(site.label)
            x, quantizers = _given(args, kwargs), (site.module.input_quantizer, site.module.weight_quantizer)
            how = quantizers[0].spec, quantizers[0].is_enabled, quantizers[1].is_transformed
            key = calls, StorageWeakRef(x.untyped_storage()), x.shape, x.storage_offset(), *how
            alive.append(x)
            seen.setdefault(key, []).append(site)

        return see

    with _hooked(sites, hook), _what_is_calibrated_later_off(model):
        for batch in batches:
            model(**batch)
            alive.clear()
            if len(reached) == len(sites):
                break
            calls += 1
    return list(seen.values())


def lots(groups: Sequence[list[Site]]) -> Iterator[list[list[Site]]]:
    """Runs of groups whose moments take `MEMORY` at most, or one group."""
    lot: list[list[Site]] = []
    filled = 0
    for group in groups:
        size = 4 * group[0].shape[1] ** 2
        if lot and filled + size > MEMORY:
            yield lot
            lot, filled = [], 0
        lot.append(group)
        filled += size
    if lot:
        yield lot


@torch.no_grad()
def second_moments(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], sites: Sequence[Site], what: str
) -> list[torch.Tensor]:
    """X^T X for each site, FP32 [K, K]: a row of X [tokens, K] is an input, rounded as in the product, over its norm.

    Inputs whose scale is calibrated later are taken as they are.

    Args:
        what: is done with them, for the progress bar.
    """
    moments = [torch.zeros(site.shape[1], site.shape[1], device=site.weight.device) for site in sites]
    numbers = {site.label: number for number, site in enumerate(sites)}

    def hook(site: Site) -> _Hook:
        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = rounded_input(site, _given(args, kwargs)).flatten(0, -2).float()
            x = F.normalize(x, dim=-1)
            moments[numbers[site.label]].addmm_(x.T, x)

        return add

    with _hooked(sites, hook), _what_is_calibrated_later_off(model):
        for batch in tqdm(batches, desc=what, unit="sample"):
            model(**batch)
    return moments


def rounded_input(site: Site, x: torch.Tensor) -> torch.Tensor:
    """What a site multiplies its weight by, from its input [..., K]; see `LinearProduct.forward`."""
    x = x.to(compute_dtype(x))
    if site.module.weight_quantizer.is_transformed:
        x = transformed_input(x)
    return site.module.input_quantizer(x, site.module.input_divisor(x.device))


def _given(args: tuple, kwargs: dict) -> torch.Tensor:
    """The input of a layer that is called."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def _hooked(sites: Sequence[Site], hook: Callable[[Site], _Hook]) -> Iterator[None]:
    handles = [site.module.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _what_is_calibrated_later_off(model: nn.Module) -> Iterator[None]:
    """Switch off quantizers without the scale that they need: of inputs with a tensor scale, and of the cache."""
    inputs = [site.module.input_quantizer for site in quantized_sites(model)]
    without = [quantizer for quantizer in inputs if quantizer.needs_divisor and quantizer.divisor is None]
    with disabled([*without, *(quantizer for quantizer in cache_quantizers(model) if quantizer.scale is None)]):
        yield
