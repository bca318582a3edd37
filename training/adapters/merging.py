"""The weights that a model with adapters saves: merged, on the device that trained them."""

from __future__ import annotations

import torch
from torch import nn

from qat.layers.lora import FACTORS, NAME, adapters, weight_name
from qat.layers.names import original_name
from qat.layers.packed_base import packed_sites, unpack_base
from qat.numerics import ops


@torch.no_grad()
def merged_weights(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The weights that a finished model has in place of the stored ones, by name, on the CPU, in the stored dtype:
    those of layers with an adapter, merged; packed ones without an adapter, dequantized.

    Sharded tensors are gathered one layer at a time; then all processes must call this.

    Args:
        keep: False for a process that takes part in the gathering and keeps nothing.
    """
    result = {}
    for name, module in adapters(model).items():
        weight = _merged(module)
        if keep:
            result[weight_name(original_name(name), module)] = weight.contiguous().cpu()
    rest = {name: site for name, site in packed_sites(model).items() if keep and name not in result}
    return result | {name: site.weight.contiguous().cpu() for name, site in rest.items()}


@torch.no_grad()
def put_merged(model: nn.Module) -> nn.Module:
    """Put the merged weights into a model that is whole, in place of its adapters, which are gone then."""
    unpack_base(model)
    for module in adapters(model).values():
        module.weight.data.copy_(_merged(module))
        delattr(module, NAME)
    return model


def _merged(module: nn.Module) -> torch.Tensor:
    """The merged weight of a layer with an adapter, in the layout of the parameter, on its device."""
    adapter = module.get_submodule(NAME)
    a, b = (_whole(getattr(adapter, factor)) for factor in FACTORS)
    return module.from_rows(ops.merge(module.rows(_whole(module.weight)), a, b, adapter.scaling))


@torch.no_grad()
def factors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of A and B of all adapters by their names, whole, on the CPU; all processes must call this."""
    return {
        f"{original_name(name)}.{NAME}.{factor}": _whole(getattr(module.get_submodule(NAME), factor)).to(
            "cpu", copy=True
        )
        for name, module in adapters(model).items()
        for factor in FACTORS
    }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
