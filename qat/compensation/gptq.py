"""GPTQ as the start of training: weights that make up for their own rounding.

GPTQ (arXiv:2210.17323) rounds a weight W [N, K] column by column; the columns that follow make up for the error of each
in the outputs on some samples. Here a column is kept as it was just before it was rounded. Rounded to the nearest these
weights are almost the values that GPTQ chooses, and training moves them as any others, which values on the grid would
not let it do. Where nothing is trained, weights in MX formats get GPTQ's own values. In MX formats with inputs in
Hadamard blocks that is MR-GPTQ (arXiv:2509.23202).

With H = X^T X of the rounded inputs, each token's divided by its norm (see moments.py), U the upper Cholesky factor of
H^-1, and q the rounding:

    e_j = (w_j - q(w_j)) / U_jj,    w_k -= e_j U_jk for each k > j
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..layers.sites import EXPERTS, Site, quantized_sites
from ..numerics import ops
from ..numerics.formats import E8M0, Quantized
from ..schemes.spec import TensorSpec
from .moments import groups_of, linear_sites, lots, second_moments

logger = logging.getLogger(__name__)

DAMPING = 0.1  # of the mean of H's diagonal, added to it; more than GPTQ's 0.01, for text unlike the samples
_UNREACHED = "no sample reaches it"
_SHARED = "it shares its weight with another module, or its weight is not rounded"
_CHUNK = 128  # columns whose errors are passed on to the others at once


@dataclass(frozen=True)
class Compensated:
    """What was done to a model.

    Attributes:
        layers: how many have weights that make up for their rounding now.
        experts: how many stacks of experts have weights as before.
        left: other layers whose weights are as before, by name, and why.
    """

    layers: int
    experts: int
    left: dict[str, str]


@torch.no_grad()
def compensate(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    damping: float = DAMPING,
    rounds: bool = False,
) -> Compensated:
    """Have the weights of linear layers make up for their own rounding, in place.

    Layers are done in the order of the model, as many at once as fit into `moments.MEMORY`: those that follow see the
    inputs that the weights before them give.

    Args:
        model: prepared by `prepare_qat`, with weights in FP32; its quantizers on, except those that stay off.
        batches: what it is called with, on its device; without padding, since all tokens count.
        damping: of the mean of the diagonal of the moments, added to it.
        rounds: weights in MX formats become GPTQ's rounded values; nearer to the unquantized model than rounding later,
            and no start for training. A block that would not round to itself once it is saved in BF16 or FP32 stays
            unrounded: transformed, its maximum comes back a little smaller or larger, and FLOOR and RCEIL then choose
            another scale. Other formats choose their scales by the largest value again, so all of theirs do.

    Raises:
        UserError: there is no batch, or a layer's inputs are not finite.
    """
    batches = list(batches)
    if not batches:
        raise UserError("GPTQ needs at least one sample; give more data, or leave it off (weight_init none)")
    was_training = model.training
    model.eval()
    try:
        chosen = linear_sites(model)
        groups = groups_of(model, batches, chosen)
        for lot in lots(groups):
            moments = second_moments(model, batches, [group[0] for group in lot], "Inputs of layers")
            moments.reverse()
            for group in tqdm(lot, desc="GPTQ", unit="input"):
                _compensate_group(group, moments.pop(), damping, rounds)
    finally:
        model.train(was_training)
    reached = {site.label for group in groups for site in group}
    could = {site.label for site in chosen}
    others = [site for site in quantized_sites(model) if site.label not in reached]
    linear = [site.label for site in others if site.kind != EXPERTS.name]
    left = {name: _UNREACHED if name in could else _SHARED for name in linear}
    result = Compensated(len(reached), len(others) - len(linear), left)
    _log(result)
    return result


def _compensate_group(group: Sequence[Site], moment: torch.Tensor, damping: float, rounds: bool) -> None:
    """The weights of sites with one input; those with the same rounding are done together."""
    if not moment.isfinite().all():
        raise UserError(
            f"GPTQ: inputs of {group[0].label} are NaN or infinite on the samples; look at the data and the weights, "
            "or leave it off (weight_init none)"
        )
    factor = inverse_factor(moment, damping)
    together: dict[TensorSpec, list[Site]] = {}
    for site in group:
        together.setdefault(site.module.weight_quantizer.spec, []).append(site)
    for spec, sites in together.items():
        rows = [_seen(site) for site in sites]
        tensor_scale = spec.format.tensor_scale is not None
        divisors = [_divisor(site) if tensor_scale else None for site in sites]
        parts = [(torch.cat(rows), None)] if not tensor_scale else list(zip(rows, divisors, strict=True))
        results = [compensated(weight, factor, spec, divisor) for weight, divisor in parts]
        found = torch.cat([columns for columns, _ in results])
        if rounds and spec.format.scale is E8M0:
            values = torch.cat([values for _, values in results])
            found = torch.where(_last(values, spec, sites[0].module.weight_quantizer.is_transformed), values, found)
        for site, own in zip(sites, found.split([len(r) for r in rows]), strict=True):
            if site.module.weight_quantizer.is_transformed:
                own = ops.transform(own.contiguous(), torch.float32)  # T is its own inverse
            site.rows(site.weight).copy_(own)


def _last(values: torch.Tensor, spec: TensorSpec, is_transformed: bool) -> torch.Tensor:
    """Which of rounded values [N, K] are in blocks that round to themselves when they have been saved; bool [N, K]."""
    same = torch.ones_like(values, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        own = ops.transform(values.contiguous(), torch.float32) if is_transformed else values  # T is its own inverse
        saved = own.to(dtype).float().contiguous()
        read = ops.transform(saved, torch.float32) if is_transformed else saved
        same &= ops.fake_quantize(read, spec.format.name, spec.rule, torch.float32) == values
    blocks = same.unflatten(-1, (-1, spec.format.block))
    return blocks.all(-1, keepdim=True).expand_as(blocks).flatten(-2)


def _seen(site: Site) -> torch.Tensor:
    """The weight as it is rounded: FP32 rows [N, K], transformed where the layer's input is."""
    rows = site.rows(site.weight).float().contiguous()
    return ops.transform(rows, torch.float32) if site.module.weight_quantizer.is_transformed else rows


def _divisor(site: Site) -> torch.Tensor:
    """That of the weight: of all layers that engines fuse with this one."""
    weights = [layer.effective_weight().detach() for layer in site.module.fused_with]
    return ops.tensor_divisor(weights, site.module.weight_quantizer.spec.format.name, torch.float32)


def inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular with U^T U = H^-1, of H = moment + damping * mean of its diagonal; FP32 [K, K].

    Without any input H is a multiple of 1: nothing is passed on.
    """
    damped = moment.double() if moment.device.type == "cpu" and len(moment) <= 2048 else moment.clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def compensated(
    weight: torch.Tensor, factor: torch.Tensor, spec: TensorSpec, divisor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that makes up for its rounding.

    Blocks have the scale that the rule gives them when their first column is reached.

    Args:
        weight: FP32 [N, K], as it is rounded.
        factor: U of `inverse_factor`, FP32 [K, K].
        spec: of the rounding.
        divisor: FP32 [1], in formats with a tensor scale.

    Returns:
        FP32 [N, K] each: the columns before they were rounded, and their rounded values, which are GPTQ's.
    """
    fmt, columns = spec.format, weight.shape[1]
    weight, rounded = weight.clone(), torch.empty_like(weight)
    whole = ops.quantize(weight, fmt.name, spec.rule, torch.float32, divisor) if fmt.block is None else None
    step = fmt.block or _CHUNK
    size = max(step, _CHUNK)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        chunk = weight[:, start:stop]  # a view: columns that follow in it are changed in place
        errors = torch.zeros_like(chunk)
        for left in range(0, stop - start, step):
            right = min(left + step, stop - start)
            block = chunk[:, left:right].contiguous()
            scales = (whole or ops.quantize(block, fmt.name, spec.rule, torch.float32, divisor)).scales
            for column in range(left, right):
                value = _rounded(chunk[:, left:right].contiguous(), scales, spec, divisor)[:, column - left]
                row = start + column
                error = (chunk[:, column] - value) / factor[row, row]
                rounded[:, row], errors[:, column] = value, error
                chunk[:, column + 1 :].addr_(error, factor[row, row + 1 : stop], alpha=-1)
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return weight, rounded


def _rounded(
    block: torch.Tensor, scales: tuple[torch.Tensor, ...], spec: TensorSpec, divisor: torch.Tensor | None
) -> torch.Tensor:
    """The values of a block [N, columns] under given scales."""
    name = spec.format.name
    codes = ops.quantize_to_scale(block, scales[0], name, torch.float32, divisor)
    return ops.dequantize(Quantized(codes, scales), name, torch.float32)


def _log(result: Compensated) -> None:
    text = f"{result.layers} linear layers start from weights that make up for their own rounding (GPTQ)"
    if result.experts:
        text += f"; left as they are: {result.experts} stacks of experts"
    for reason in dict.fromkeys(result.left.values()):
        names = [name for name, own in result.left.items() if own == reason]
        text += f"; left as they are, since {reason}: {', '.join(names[:3])}" + ", ..." * (len(names) > 3)
    log = logger.info if result.layers and not result.left else logger.warning
    log("%s", text)
