"""Calibration: scales that engines read from the checkpoint, from the activations of some samples.

Two kinds of tensors have such a scale. Inputs in formats with a tensor scale have a divisor (NVFP4's
`input_global_scale`): 448 * 6 over the largest magnitude that a layer reads; layers that engines fuse read the same
input and share it. Keys and values in the cache have a scale (`k_scale`, `v_scale`): their largest magnitude over 448.
The samples run through the unquantized model, once for all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..numerics import fp8
from ..numerics.families import family_of
from ..schemes.config import QATConfig
from .kv_cache import CacheQuantizer, cache_quantizers
from .names import original_name
from .operands import Operands
from .prepare import set_qat_config
from .sites import quantized_sites, quantizers_off

logger = logging.getLogger(__name__)

DIVISOR = "input_global_scale"  # compressed-tensors' name of the divisor of a layer's inputs


class _Scale(Protocol):
    """A calibrated scale: of what the module `reader` reads.

    Attributes:
        what: messages call the tensor that it scales.
    """

    @property
    def reader(self) -> nn.Module: ...
    @property
    def what(self) -> str: ...
    def get(self) -> float | None: ...
    def set(self, value: float) -> None: ...
    def from_largest(self, largest: Mapping[nn.Module, torch.Tensor]) -> torch.Tensor: ...


@dataclass(frozen=True)
class _InputDivisor:
    reader: Operands
    name: str

    @property
    def what(self) -> str:
        return f"the input of {self.name}"

    def get(self) -> float | None:
        divisor = self.reader.input_quantizer.divisor
        return None if divisor is None else float(divisor)

    def set(self, value: float) -> None:
        self.reader.input_quantizer.divisor = torch.tensor([value], dtype=torch.float32)

    def from_largest(self, largest: Mapping[nn.Module, torch.Tensor]) -> torch.Tensor:
        together = torch.stack([largest[layer] for layer in self.reader.fused_with if layer in largest]).max()
        return family_of(self.reader.input_quantizer.spec.format).tensor_divisor(together)


@dataclass(frozen=True)
class _CacheScale:
    reader: CacheQuantizer

    @property
    def what(self) -> str:
        return f"what {self.reader.tensor} scales"

    def get(self) -> float | None:
        return self.reader.scale

    def set(self, value: float) -> None:
        self.reader.scale = value

    def from_largest(self, largest: Mapping[nn.Module, torch.Tensor]) -> torch.Tensor:
        return fp8.tensor_scale(largest[self.reader])


def calibrated_layers(model: nn.Module) -> dict[str, Operands]:
    """The layers of a prepared model whose inputs need a divisor, by name."""
    layers = {site.label: site.module for site in quantized_sites(model)}
    return {name: layer for name, layer in layers.items() if layer.input_quantizer.needs_divisor}


def _scales(model: nn.Module) -> dict[str, _Scale]:
    """All scales of a prepared model that are calibrated, by the names of their tensors."""
    inputs = {
        original_name(f"{name}.{DIVISOR}"): _InputDivisor(layer, name)
        for name, layer in calibrated_layers(model).items()
    }
    return {**inputs, **{quantizer.tensor: _CacheScale(quantizer) for quantizer in cache_quantizers(model)}}


@torch.no_grad()
def calibrate_inputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    total: int | None = None,
    forward: Callable[..., object] | None = None,
) -> None:
    """Set all calibrated scales of a model, of inputs, keys and values, from the largest magnitudes of `batches`.

    Args:
        model: prepared by `prepare_qat`; models without such scales are left as they are.
        batches: keyword arguments of the model.
        total: how many there are, for the progress bar.
        forward: what is called with them: the model as it is wrapped for several processes; default: the model.

    Raises:
        UserError: no batch, or a tensor whose largest magnitude is 0 or not finite.
    """
    scales = _scales(model)
    if not scales:
        return
    largest: dict[nn.Module, torch.Tensor] = {}
    handles = [scale.reader.register_forward_pre_hook(_recorder(largest)) for scale in scales.values()]
    run = model if forward is None else forward  # a compiled model has no truth value
    was_training, count = {module: module.training for module in model.modules()}, 0
    model.eval()
    try:
        with quantizers_off(model):
            for batch in tqdm(batches, total=total, desc="Calibrating scales", unit=" batches"):
                run(**batch)
                count += 1
    finally:
        for module, mode in was_training.items():  # parts of a model may be in other modes
            module.training = mode
        for handle in handles:
            handle.remove()
    for scale in scales.values():
        amax = float(largest.get(scale.reader, 0.0))
        if not 0 < amax < math.inf:
            raise UserError(
                f"calibration: {scale.what} has the largest magnitude {amax} in the samples; give more or other "
                "samples, or leave it unquantized"
            )
    for scale in scales.values():
        scale.set(float(scale.from_largest(largest)))
    _record(model)
    logger.info("Calibrated %d scales on %d samples", len(scales), count)


def _recorder(largest: dict[nn.Module, torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not inputs[0].numel():  # an expert that no token of a batch reaches
            return
        amax = torch.linalg.vector_norm(inputs[0].detach().float(), torch.inf)
        largest[module] = torch.maximum(largest[module], amax) if module in largest else amax

    return record


def calibrated_scales(model: nn.Module) -> dict[str, float]:
    """The calibrated scales of a prepared model by the names of their tensors, as `QATConfig` keeps them.

    Returns:
        Exact FP32 values; those of quantizers that are not calibrated yet are not among them.
    """
    return {name: value for name, scale in _scales(model).items() if (value := scale.get()) is not None}


def set_calibrated_scales(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Give a prepared model the scales that `calibrated_scales` returned, and let its `qat_config` have them.

    Raises:
        UserError: one of them is missing, is not a positive number, or belongs to no layer.
    """
    own = _scales(model)
    if wrong := sorted(set(scales) ^ set(own)):
        kind = "lack" if wrong[0] in own else "have, for no layer,"
        raise UserError(f"the calibrated scales {kind} {wrong[0]}; calibrate again")
    for name, value in scales.items():
        if not 0 < value < math.inf:
            raise UserError(f"the calibrated scale {name} is {value}, not a positive number; calibrate again")
    for name, value in scales.items():
        own[name].set(float(torch.tensor(value, dtype=torch.float32)))
    _record(model)


def _record(model: nn.Module) -> None:
    """Let the `qat_config` of a prepared model have its calibrated scales."""
    config: QATConfig = model.qat_config  # type: ignore[assignment]
    set_qat_config(model, replace(config, calibrated_scales=calibrated_scales(model)))


def needs_calibration(model: nn.Module) -> bool:
    """Whether some quantizer of a prepared model has no calibrated scale yet."""
    return any(scale.get() is None for scale in _scales(model).values())
