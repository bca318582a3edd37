"""Pack the weights of a prepared model, which stay frozen while adapters are trained (QLoRA)."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import nn

from ..errors import UserError
from ..numerics import ops
from ..numerics.formats import E8M0
from ..schemes.spec import VIEW_DTYPE
from .experts import ExpertProjection
from .lora import NAME as ADAPTER
from .names import original_name
from .packed_weight import NAME, PackedWeight, pack_parameter, packed_of, unpack_parameter
from .sites import Site, quantized_sites

logger = logging.getLogger(__name__)


@torch.no_grad()
def pack_base(model: nn.Module, exact: bool = False) -> nn.Module:
    """Keep the weight of every quantized layer as codes of its scheme, in place, one layer after the other.

    The codes are those that an export of the model would have: of the weight seen in BF16, under the scheme's own rule.
    A weight that another module shares stays as it is.

    Args:
        model: prepared and whole; adapters stay as they are.
        exact: the weights are those of `dequantized_base`, and must be the same afterwards, bit for bit.

    Returns:
        `model`. Its quantized weights are still there under their names, dequantized when they are read.

    Raises:
        UserError: nothing is quantized, layers learn scales of their weights, or, with `exact`, values would change.
    """
    sites = quantized_sites(model)
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    shared = [site.label for site in sites if uses[id(site.kept)] > 1]
    sites = [site for site in sites if site.label not in shared and packed_of(site.module) is None]
    if not sites:
        raise UserError("no weight can be packed: the model has no quantized layer with a weight of its own")
    if learns := next((site.label for site in sites if site.module.weight_quantizer.learned), None):
        raise UserError(f"{learns} learns scales of its weight, which is frozen once it is packed; do one of both")
    before = sum(site.weight.nbytes for site in sites)
    divisors = {site.label: _divisor(site) for site in sites}  # of layers that share one, before any is packed
    for site in sites:
        _pack(site, divisors.pop(site.label), exact)
    _report(model, before, shared)
    _warn_if_rounded_twice(sites)
    return model


@torch.no_grad()
def unpack_base(model: nn.Module) -> nn.Module:
    """The inverse of `pack_base`, in place: weights are frozen BF16 parameters again, with the packed values."""
    for site in packed_sites(model).values():
        unpack_parameter(site.owner, site.parameter, site.module)
    return model


def packed_sites(model: nn.Module) -> dict[str, Site]:
    """The sites of a model whose weights are packed, by the names of these weights."""
    return {original_name(s.tensor): s for s in quantized_sites(model) if packed_of(s.module) is not None}


@torch.no_grad()
def dequantized_base(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model that adapters of a packed model belong to.

    Returns:
        Its complete state dict by the names of a plain checkpoint, on the CPU, without adapters: packed weights as the
        BF16 values that the layers compute with, contiguous; everything else as it is, sharing memory where the model
        is on the CPU.
    """
    plain = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if not is_own(name)}
    return plain | {name: site.weight.contiguous().cpu() for name, site in packed_sites(model).items()}


def is_own(name: str) -> bool:
    """Whether a tensor of this name in a state dict belongs to an adapter or to a packed weight."""
    return any(f".{part}." in name for part in (NAME, ADAPTER))


def _divisor(site: Site) -> torch.Tensor | None:
    """That of the weight in formats with a tensor scale, as an export has it: layers that engines fuse share one."""
    fmt = site.scheme.weight.format
    if fmt.tensor_scale is None:
        return None
    if isinstance(site.module, ExpertProjection):
        return site.module.divisors(site.weight, VIEW_DTYPE)
    return ops.tensor_divisor([layer.weight for layer in site.module.fused_with], fmt.name, VIEW_DTYPE)


def _pack(site: Site, divisor: torch.Tensor | None, exact: bool) -> None:
    rows = site.rows(site.weight.detach()).contiguous()
    rounding = site.module.weight_quantizer.rounding
    quantized = rounding.quantize(rows, VIEW_DTYPE, divisor=divisor)
    fmt = rounding.spec.format
    if exact and not torch.equal(ops.dequantize(quantized, fmt.name, VIEW_DTYPE), rows.to(VIEW_DTYPE)):
        raise UserError(
            f"{site.label} cannot be packed as it was: scale rule {rounding.spec.rule} of {fmt.name} makes other "
            "scales of values that it has rounded; start anew, or with absmax in NVFP4, or in an MX format"
        )
    pack_parameter(site.owner, site.parameter, site.module, quantized, fmt)


def _report(model: nn.Module, before: int, shared: list[str]) -> None:
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    after = sum(module.nbytes for module in packed)
    values = sum(module.shape.numel() for module in packed)
    others = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    logger.info(
        "%d frozen weights are kept as codes of their schemes: %s in place of %s (%.2f bits a value); %s of other "
        "weights stay as they are",
        len(packed), _size(after), _size(before), 8 * after / values, _size(others),
    )  # fmt: skip
    if shared:
        logger.warning(
            "%s and %d more are not packed: another module shares the weight", shared[0], len(shared) - 1
        )  # fmt: skip


def _warn_if_rounded_twice(sites: list[Site]) -> None:
    """Log how many values change where they are rounded again: of a scale that is no power of two, the rule may make
    another one for values that it has rounded already."""
    changed, total = 0, 0
    for site in sites:
        if site.scheme.weight.format.scale != E8M0:
            rows = site.rows(site.weight)
            again = site.module.weight_quantizer.rounding.values(rows, VIEW_DTYPE, divisor=_divisor(site))
            changed, total = changed + int((again != rows).sum()), total + rows.numel()
    if changed:
        logger.warning(
            "weights are rounded to be packed, and once more when layers compute with them: then %.1f %% of the values "
            "change; fewer do in INT4 under --weight_scale_rule search, none in NVFP4 under absmax and in MX formats",
            100 * changed / total,
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
