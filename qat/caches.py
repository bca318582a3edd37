"""Quantize once what does not change: the input that several layers share, the weight until somebody edits it.

An input is the same if it is the same tensor object with the same version counter, as when q_proj, k_proj and v_proj
are called one after the other.

A weight is the same if its memory, its version counter (which in-place operations and `load_state_dict` advance), the
count of optimizer steps and, because edits through `weight.data` escape that counter, a fingerprint of all its bytes
are. Codes are made when a forward pass meets a weight a second time: in evaluation, gradient accumulation and
checkpoint recompute. A plain training step, which changes every weight each time, pays for neither codes nor
fingerprints; its backward rounds the weight again. On a CPU, fingerprint and codes together take two thirds of the time
of rounding again, a third under rule search. On a GPU a fingerprint would make the host wait for the device, and
rounding runs at the speed of a copy; so weights are not cached there.

Under torch.compile nothing is cached here: the compiler removes common subexpressions itself. With torch.distributed
initialized weights are not cached, since FSDP frees their memory and codes would not be sharded.
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
        self._fingerprint: tuple | None = None

    def values(
        self, weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`gradients.fake_quantize(weight)` without a gradient: from codes if they are those of the weight as it is."""
        needs_codes = offset is not None or spec.clips_gradients  # in its backward
        if not _weights_are_cacheable(weight):
            packed = None if offset is None else gradients.quantize(weight, spec, dtype, offset)
            return _values_of(weight, packed, spec, dtype)
        key = _key_of(weight, spec, dtype, offset)
        if key != self._key:
            self._key, self._fingerprint = key, None
            self._packed = gradients.quantize(weight, spec, dtype, offset) if needs_codes else None
            return _values_of(weight, self._packed, spec, dtype)
        fingerprint = (ops.fingerprint(weight), None if offset is None else ops.fingerprint(offset.contiguous()))
        if self._packed is None or fingerprint != self._fingerprint:
            self._packed = gradients.quantize(weight, spec, dtype, offset)
            self._fingerprint = fingerprint
        return _values_of(weight, self._packed, spec, dtype)

    def values_for_backward(
        self, weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same for the backward pass of a forward pass that called `values`: keeps no codes, checks no bytes."""
        packed = self._known(weight, spec, dtype, offset)
        if packed is None and offset is not None:
            packed = gradients.quantize(weight, spec, dtype, offset)
        return _values_of(weight, packed, spec, dtype)

    def codes_for_backward(
        self, weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None = None
    ) -> Packed:
        """`gradients.quantize(weight)`, from the cache as in `values_for_backward`."""
        packed = self._known(weight, spec, dtype, offset)
        return gradients.quantize(weight, spec, dtype, offset) if packed is None else packed

    def _known(self, weight, spec, dtype, offset) -> Packed | None:
        if not _weights_are_cacheable(weight) or self._key != _key_of(weight, spec, dtype, offset):
            return None
        return self._packed

    def __deepcopy__(self, memo) -> WeightCache:
        return WeightCache()

    def __reduce__(self):
        return (WeightCache, ())


def _key_of(weight: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, offset: torch.Tensor | None) -> tuple:
    moved = None if offset is None else (offset.data_ptr(), offset._version)
    return (weight.data_ptr(), weight._version, weight.dtype, weight.device, _weight_epoch, moved, spec, dtype)


def _weights_are_cacheable(weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or weight.is_inference() or type(weight) is not torch.nn.Parameter:
        return False
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _values_of(x: torch.Tensor, packed: Packed | None, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    if packed is None:
        return ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
    return ops.dequantize(*packed, spec.format_name, dtype)
