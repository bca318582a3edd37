"""Calibration: the divisors of inputs in formats with a tensor scale, from the activations of some samples.

Engines quantize such inputs under a divisor that the checkpoint holds (NVFP4's `input_global_scale`): 448 * 6 over the
largest magnitude that a layer reads. Layers that engines fuse read the same input and share it. The samples run through
the unquantized model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..numerics.families import family_of
from .names import original_name
from .prepare import set_qat_config
from .quant_linear import QuantLinear
from .sites import quantized_sites, quantizers_off

DIVISOR = "input_global_scale"  # compressed-tensors' name of the divisor of a layer's inputs


def calibrated_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers of a prepared model whose inputs need a divisor, by name."""
    layers = {site.name: site.module for site in quantized_sites(model)}
    return {name: layer for name, layer in layers.items() if layer.input_quantizer.needs_divisor}


@torch.no_grad()
def calibrate_inputs(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], total: int | None = None) -> None:
    """Set the divisors of all inputs that need one from the largest magnitudes of `batches`.

    Args:
        model: prepared by `prepare_qat`; models without such inputs are left as they are.
        batches: keyword arguments of the model.
        total: how many there are, for the progress bar.

    Raises:
        UserError: no batch, or an input whose largest magnitude is 0 or not finite.
    """
    layers = calibrated_layers(model)
    if not layers:
        return
    largest: dict[str, torch.Tensor] = {}
    handles = [layer.register_forward_pre_hook(_recorder(name, largest)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        with quantizers_off(model):
            for batch in tqdm(batches, total=total, desc="Calibrating input scales", unit=" batches"):
                model(**batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    unread = next((name for name in layers if not 0 < float(largest.get(name, 0.0)) < torch.inf), None)
    if unread is not None:
        raise UserError(
            f"calibration: the input of {unread} has the largest magnitude {float(largest.get(unread, 0.0))} in the "
            "samples; give more or other samples, or leave the layer unquantized"
        )
    amax = {id(layers[name]): value for name, value in largest.items()}
    for layer in layers.values():
        together = torch.stack([amax[id(other)] for other in layer.fused_with if id(other) in amax]).max()
        layer.input_quantizer.divisor = family_of(layer.input_quantizer.spec.format).tensor_divisor(together)
    record_scales(model)


def _recorder(name: str, largest: dict[str, torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        amax = torch.linalg.vector_norm(inputs[0].detach().float(), torch.inf)
        largest[name] = torch.maximum(largest[name], amax) if name in largest else amax

    return record


def calibrated_scales(model: nn.Module) -> dict[str, float]:
    """The calibrated scales of a prepared model by the names of their tensors, as `QATConfig` keeps them.

    Returns:
        Exact FP32 values; those of quantizers that are not calibrated yet are not among them.
    """
    layers = calibrated_layers(model)
    return {
        original_name(f"{name}.{DIVISOR}"): float(quantizer.divisor)
        for name, layer in layers.items()
        if (quantizer := layer.input_quantizer).divisor is not None
    }


def set_calibrated_scales(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Give a prepared model the scales that `calibrated_scales` returned, and let its `qat_config` have them.

    Raises:
        UserError: one of them is missing, is not a positive number, or belongs to no layer.
    """
    layers = {original_name(f"{name}.{DIVISOR}"): layer for name, layer in calibrated_layers(model).items()}
    if wrong := sorted(set(scales) ^ set(layers)):
        kind = "lacks" if wrong[0] in layers else "have, for no layer,"
        raise UserError(f"the calibrated scales {kind} {wrong[0]}; calibrate again")
    for name, value in scales.items():
        if not 0 < value < math.inf:
            raise UserError(f"the calibrated scale {name} is {value}, not a positive number; calibrate again")
        layer = layers[name]
        device = "cpu" if layer.weight.is_meta else layer.weight.device  # a skeleton has values of scales too
        layer.input_quantizer.divisor = torch.tensor([value], dtype=torch.float32, device=device)
    record_scales(model)


def record_scales(model: nn.Module) -> None:
    """Let the `qat_config` of a prepared model have its calibrated scales."""
    set_qat_config(model, replace(model.qat_config, calibrated_scales=calibrated_scales(model)))


def needs_calibration(model: nn.Module) -> bool:
    """Whether some quantizer of a prepared model has no calibrated scale yet."""
    return any(layer.input_quantizer.divisor is None for layer in calibrated_layers(model).values())
