"""Calibration: the divisors of inputs in formats with a tensor scale, from the activations of some samples.

Engines quantize such inputs under a divisor that the checkpoint holds (NVFP4's `input_global_scale`): 448 * 6 over the
largest magnitude that a layer reads. Layers that engines fuse read the same input and share it. The samples run through
the unquantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..numerics.families import family_of
from .quant_linear import QuantLinear
from .sites import quantized_sites, quantizers_off


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


def _recorder(name: str, largest: dict[str, torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        amax = torch.linalg.vector_norm(inputs[0].detach().float(), torch.inf)
        largest[name] = torch.maximum(largest[name], amax) if name in largest else amax

    return record


def input_divisors(model: nn.Module) -> dict[str, float]:
    """The divisors of a model's inputs by the names of their layers, as `QATConfig` keeps them: exact FP32 values."""
    layers = calibrated_layers(model)
    return {
        name: float(q.divisor) for name, layer in layers.items() if (q := layer.input_quantizer).divisor is not None
    }


def set_input_divisors(model: nn.Module, divisors: Mapping[str, float]) -> None:
    """Give the inputs of a prepared model the divisors that `input_divisors` returned.

    Raises:
        UserError: one of them is missing, is not a positive number, or belongs to no layer.
    """
    layers = calibrated_layers(model)
    if wrong := sorted(set(divisors) ^ set(layers)):
        kind = "no divisor for" if wrong[0] in layers else "a divisor for the unknown layer"
        raise UserError(f"input_divisors has {kind} {wrong[0]}; export or calibrate again")
    for name, value in divisors.items():
        if not 0 < value < torch.inf:
            raise UserError(f"input_divisors: {value} of {name} is not a positive number; calibrate again")
        quantizer = layers[name].input_quantizer
        quantizer.divisor = torch.tensor([value], dtype=torch.float32, device=layers[name].weight.device)
