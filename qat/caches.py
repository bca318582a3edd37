"""Quantize once what does not change: the input that several layers share, the weight until somebody edits it.

Neither cache ever decides by value. An input is the same if it is the same tensor object with the same version counter,
as when q_proj, k_proj and v_proj are called one after the other. A weight is the same if its memory, its version
counter (which every in-place operation and `load_state_dict` advances) and the count of optimizer steps are; edits
through `weight.data` escape PyTorch's counter: call `forget_quantized_weights()` after such edits outside of an
optimizer.

Under torch.compile nothing is cached here: the compiler removes common subexpressions itself. With torch.distributed
initialized weights are not cached, since FSDP refills their memory behind the version counter.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import gradients, ops
from .schemes import TensorSpec

Packed = tuple[torch.Tensor, torch.Tensor]  # element codes and E8M0 scales, as `ops.quantize` gives them

_weight_epoch = 0


def forget_quantized_weights(*_ignored) -> None:
    """Make every cached weight stale; called after each optimizer step."""
    global _weight_epoch
    _weight_epoch += 1


register_optimizer_step_post_hook(forget_quantized_weights)


@dataclass
class _Entry:
    source: weakref.ref
    key: tuple
    packed: Packed | None = None
    values: torch.Tensor | None = None
    saturation: torch.Tensor | None = None


class InputCache(threading.local):
    """The last input quantized in this thread, with its codes and values; forgotten when that input dies."""

    entry: _Entry | None = None

    def codes(self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> Packed:
        """`ops.quantize(x)`, computed once for the layers that share x."""
        entry = self._find(x, spec, dtype)
        if entry is None:
            return ops.quantize(x, spec.format_name, spec.scale_rule, dtype)
        if entry.packed is None:
            entry.packed = ops.quantize(x, spec.format_name, spec.scale_rule, dtype)
        return entry.packed

    def values(self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """`ops.fake_quantize(x)`, computed once, from the codes where they exist."""
        entry = self._find(x, spec, dtype)
        if entry is None:
            return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
        if entry.values is None:
            entry.values = _values_of(x, entry.packed, spec, dtype)
        return entry.values

    def saturation(self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """`ops.saturation_mask(x)` under x's own scales, computed once."""
        entry = self._find(x, spec, dtype)
        if entry is not None and entry.saturation is not None:
            return entry.saturation
        mask = ops.saturation_mask(x, self.codes(x, spec, dtype)[1], spec.format_name, dtype)
        if entry is not None:
            entry.saturation = mask
        return mask

    def _find(self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> _Entry | None:
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        key = (x._version, spec, dtype)
        entry = self.entry
        if entry is None or entry.source() is not x or entry.key != key:
            self.entry = entry = _Entry(weakref.ref(x, self._forget), key)
        return entry

    def _forget(self, source: weakref.ref) -> None:
        if self.entry is not None and self.entry.source is source:
            self.entry = None


class WeightCache:
    """The codes of one layer's weight: 4.25 or 8.25 bits a value, instead of rounding the FP32 master again."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._packed: Packed | None = None

    def values(
        self, weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`gradients.fake_quantize(weight)` without a gradient, from codes when the weight is what it was."""
        if offset is None and not _weights_are_cacheable(weight):
            return ops.fake_quantize(weight, spec.format_name, spec.scale_rule, dtype)
        return ops.dequantize(*self.codes(weight, spec, dtype, offset), spec.format_name, dtype)

    def codes(
        self, weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None = None
    ) -> Packed:
        """`gradients.quantize(weight)`, done once for a weight and the offset of its exponents."""
        if not _weights_are_cacheable(weight):
            return gradients.quantize(weight, spec, dtype, offset)
        moved = None if offset is None else (offset.data_ptr(), offset._version)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device, _weight_epoch, moved, spec, dtype)
        if key != self._key:
            self._packed = gradients.quantize(weight, spec, dtype, offset)
            self._key = key
        return self._packed

    def __deepcopy__(self, memo) -> WeightCache:
        return WeightCache()

    def __reduce__(self):
        return (WeightCache, ())


def _weights_are_cacheable(weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or weight.is_inference() or type(weight) is not torch.nn.Parameter:
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _values_of(x: torch.Tensor, packed: Packed | None, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    if packed is None:
        return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
    return ops.dequantize(*packed, spec.format_name, dtype)
