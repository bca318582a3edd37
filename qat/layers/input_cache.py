"""Quantize once the input that several layers share.

An input is the same if it is the same tensor object with the same version counter, as when q_proj, k_proj and v_proj
are called one after the other. Under torch.compile nothing is cached here: the compiler removes common subexpressions
itself.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch

from ..numerics import ops
from ..schemes.spec import TensorSpec

Packed = tuple[torch.Tensor, torch.Tensor]  # element codes and E8M0 scales, as `ops.quantize` gives them


@dataclass
class _Entry:
    source: weakref.ref
    key: tuple
    packed: Packed | None = None
    values: torch.Tensor | None = None


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
            entry.values = (
                ops.fake_quantize(x, spec.format_name, spec.scale_rule, dtype)
                if entry.packed is None
                else ops.dequantize(*entry.packed, spec.format_name, dtype)
            )
        return entry.values

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
