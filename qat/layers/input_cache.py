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
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec


@dataclass
class _Entry:
    source: weakref.ref
    key: tuple
    quantized: Quantized | None = None
    values: torch.Tensor | None = None


class InputCache(threading.local):
    """The last input quantized in this thread, with its codes and values; forgotten when that input dies.

    A spec of None stands for an input that is not quantized: its values are the input in `dtype`.
    """

    entry: _Entry | None = None

    def quantized(self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> Quantized:
        """`ops.quantize(x)`, computed once for the layers that share x."""
        entry = self._find(x, spec, dtype)
        if entry is None:
            return ops.quantize(x, spec.format.name, spec.rule, dtype)
        if entry.quantized is None:
            entry.quantized = ops.quantize(x, spec.format.name, spec.rule, dtype)
        return entry.quantized

    def values(self, x: torch.Tensor, spec: TensorSpec | None, dtype: torch.dtype) -> torch.Tensor:
        """`ops.fake_quantize(x)`, computed once, from the codes where they exist."""
        if spec is None and x.dtype == dtype:
            return x
        entry = self._find(x, spec, dtype)
        if entry is None:
            return _values(x, spec, dtype)
        if entry.values is None:
            has_codes = entry.quantized is not None
            # Codes exist of inputs with a spec only, which a type checker cannot see.
            entry.values = (
                ops.dequantize(entry.quantized, spec.format.name, dtype) if has_codes else _values(x, spec, dtype)  # type: ignore[arg-type, union-attr]
            )
        return entry.values

    def _find(self, x: torch.Tensor, spec: TensorSpec | None, dtype: torch.dtype) -> _Entry | None:
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


def _values(x: torch.Tensor, spec: TensorSpec | None, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if spec is None else ops.fake_quantize(x, spec.format.name, spec.rule, dtype)
