"""The strength of smoothing that each activation is given by `--smooth_alpha auto`: that of the least output error.

Activations that quantized experts read take `OF_EXPERTS`, since what is run here is linear layers only.

The layers that read an activation are run with each strength of a grid on a few rows of their input, rounded as they
will be: under their own schemes, scale rules and input transforms. The error of a row of a layer is the squared
difference from its output without rounding over the squared output, the bias left out; the mean over rows and layers
counts. Not the sum of differences: in some layers the input of one of the first tokens of a text is ten times that of
others and more (Sun et al., arXiv:2402.17762), and the sum would be of that token alone where it is drawn. A strength
of 0 leaves the activation as it is.

The factors are powers of the inputs' maxima alone. SmoothQuant's also divide by max|W|^(1 - alpha), which at small
alphas moves outliers of the weights into the input; their error at the best alpha is larger at down_proj, and about the
same elsewhere.

Rounding is not linear, so sums over all rows, such as a Gram matrix, cannot give this error; a few rows of each sample
are kept, on the CPU. They are drawn by a fixed seed. Every activation is chosen by the weights from before smoothing:
its own input does not depend on the factors of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..layers.sites import EXPERTS, Site, quantized_sites, quantizers_off
from ..numerics.families import family_of
from .activations import Activation
from .factors import factors_of

AUTO = "auto"
GRID, BETA = tuple(i / 10 for i in range(11)), 0.0  # alpha and beta of factors.py: 0 and 0 are no factors
OF_EXPERTS = 0.7  # alpha where quantized experts read: one for all, with SmoothQuant's beta, 1 - alpha
_ROWS = 16  # of each sample


def read_by_experts(model: nn.Module, activations: Iterable[Activation]) -> list[Activation]:
    """Those of the activations of a prepared model that quantized experts read."""
    experts = {id(site.weight) for site in quantized_sites(model) if site.kind == EXPERTS.name}
    return [a for a in activations if any(id(reader.parameter) in experts for reader in a.readers)]


@torch.no_grad()
def best_strengths(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], activations: Sequence[Activation]
) -> list[float]:
    """The strength of `GRID` with the least output error for each activation; the smaller of two that are equal.

    Args:
        model: prepared; its quantizers on, except those that stay off. It is left as it is, by an error, too.
        batches: what it is called with.
        activations: from `observe`, of the same batches; none that quantized experts read.
    """
    sites = {id(site.weight): site for site in quantized_sites(model)}
    readers = [[sites[id(r.parameter)] for r in a.readers if id(r.parameter) in sites] for a in activations]
    rows = _rows(model, batches, [layers[0].module for layers in readers])
    chosen = []
    for activation, layers, inputs in tqdm(list(zip(activations, readers, rows, strict=True)), desc="Strengths"):
        errors = output_errors(activation, layers, inputs.to(activation.largest.device))
        chosen.append(GRID[int(errors.nan_to_num(torch.inf).argmin())])
    return chosen


def output_errors(activation: Activation, layers: Sequence[Site], x: torch.Tensor) -> torch.Tensor:
    """The relative squared error of the outputs of `layers`, which read x [R, K], at each strength of `GRID`.

    Returns:
        FP64 [len(GRID)], the mean over rows and layers; a row whose output is zero counts as exact.
    """
    plain = [F.linear(x, site.module.rows(site.weight)) for site in layers]
    exact = [y if site.module.bias is None else y + site.module.bias for y, site in zip(plain, layers, strict=True)]
    sizes = [_squares(y) for y in plain]
    scaled = [reader for reader in activation.readers if any(reader.parameter is site.weight for site in layers)]
    kept = [reader.parameter.clone() for reader in scaled]
    errors = []
    for alpha in GRID:
        factors = activation.by_channel(factors_of(activation, alpha, BETA))
        try:
            for reader in scaled:
                reader.multiply(factors)
            with _calibrated(layers, (activation.largest / factors).amax()):
                smoothed = x / factors
                outputs = [site.module(smoothed) for site in layers]
        finally:
            for reader, value in zip(scaled, kept, strict=True):
                reader.parameter.copy_(value)
        relative = [_squares(a - b) / size for a, b, size in zip(outputs, exact, sizes, strict=True)]
        errors.append(torch.stack([r.where(size != 0, 0) for r, size in zip(relative, sizes, strict=True)]).mean())
    return torch.stack(errors)


def _squares(y: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each row of y [R, N]; FP64 [R]."""
    return y.double().pow(2).sum(-1)


def _rows(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], modules: Sequence[nn.Module]
) -> list[torch.Tensor]:
    """Some rows of what each module is called with while the model runs unquantized, [R, K] on the CPU."""
    rows: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}

    def hook(module: nn.Module, args: tuple) -> None:
        x = args[0].flatten(0, -2)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(rows[module])))
        rows[module].append(x[order[:_ROWS].to(x.device)].cpu())

    handles = [module.register_forward_pre_hook(hook) for module in rows]
    try:
        with quantizers_off(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows[module]) for module in modules]


@contextmanager
def _calibrated(layers: Sequence[Site], largest: torch.Tensor) -> Iterator[None]:
    """Let inputs in formats with a tensor scale have that of their largest magnitude inside, as calibration does."""
    quantizers: list[Any] = [site.module.input_quantizer for site in layers]
    quantizers = [quantizer for quantizer in quantizers if quantizer.needs_divisor]
    before = [quantizer.divisor for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.divisor = family_of(quantizer.spec.format).tensor_divisor(largest).reshape(1)
    try:
        yield
    finally:
        for quantizer, divisor in zip(quantizers, before, strict=True):
            quantizer.divisor = divisor
