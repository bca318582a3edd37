"""Quantize once the input that several layers share.

An input is the same if it is the same tensor object with the same version counter, as when q_proj, k_proj and v_proj
are called one after the other. Under torch.compile nothing is cached here: the compiler removes common subexpressions
itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from ..numerics import ops
from ..numerics.e4m3_rows import Rows
from ..numerics.formats import Quantized
from ..schemes.spec import TensorSpec


@dataclass
class _Entry:
    source: weakref.ref
    key: tuple
    quantized: Quantized | None = None
    values: torch.Tensor | None = None
    rows: Rows | None = None


@dataclass
class _Notes:
    source: weakref.ref
    version: int
    made: dict[Hashable, torch.Tensor] = field(default_factory=dict)


class InputCache(threading.local):
    """The last input quantized in this thread, with its codes and values; forgotten when that input dies.

    A spec of None stands for an input that is not quantized: its values are the input in `dtype`. With `hadamard` an
    input is transformed, before it is rounded if it is: see transform.py.
    """

    entry: _Entry | None = None
    notes: _Notes | None = None

    def quantized(
        self,
        x: torch.Tensor,
        spec: TensorSpec,
        dtype: torch.dtype,
        divisor: torch.Tensor | None = None,
        group: Hashable = None,
        hadamard: bool = False,
    ) -> Quantized:
        """`ops.quantize(x)`, computed once for the layers that share x and, in formats with a tensor scale, `group`."""
        entry = self._find(x, spec, dtype, None if divisor is None else group, hadamard)
        if entry is None:
            return ops.quantize(x, spec.format.name, spec.rule, dtype, divisor, hadamard)
        if entry.quantized is None:
            entry.quantized = ops.quantize(x, spec.format.name, spec.rule, dtype, divisor, hadamard)
        return entry.quantized

    def values(
        self,
        x: torch.Tensor,
        spec: TensorSpec | None,
        dtype: torch.dtype,
        divisor: torch.Tensor | None = None,
        group: Hashable = None,
        hadamard: bool = False,
    ) -> torch.Tensor:
        """`ops.fake_quantize(x)`, computed once, from the codes where they exist."""
        if spec is None and x.dtype == dtype and not hadamard:
            return x
        entry = self._find(x, spec, dtype, None if divisor is None else group, hadamard)
        if entry is None:
            return _values(x, spec, dtype, divisor, hadamard)
        if entry.values is None and entry.quantized is not None and spec is not None:
            entry.values = ops.dequantize(entry.quantized, spec.format.name, dtype)
        if entry.values is None:
            entry.values = _values(x, spec, dtype, divisor, hadamard)
        return entry.values

    def rows(
        self, x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, with_codes: bool, hadamard: bool = False
    ) -> tuple[Rows, Quantized | None]:
        """`ops.to_rows(x)`, computed once; without codes None takes their place."""
        entry = self._find(x, spec, dtype, None, hadamard)
        if entry is None:
            return ops.to_rows(x, spec.format.name, spec.rule, dtype, with_codes, hadamard)
        if entry.rows is None or (with_codes and entry.quantized is None):
            entry.rows, quantized = ops.to_rows(x, spec.format.name, spec.rule, dtype, with_codes, hadamard)
            entry.quantized = quantized or entry.quantized
        return entry.rows, entry.quantized if with_codes else None

    def once(self, x: torch.Tensor, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, called once for the layers that share x and `name`."""
        if torch.compiler.is_compiling() or x.is_inference():
            return make()
        notes = self.notes
        if notes is None or notes.source() is not x or notes.version != x._version:
            self.notes = notes = _Notes(weakref.ref(x), x._version)
        if name not in notes.made:
            notes.made[name] = make()
        return notes.made[name]

    def _find(
        self, x: torch.Tensor, spec: TensorSpec | None, dtype: torch.dtype, group: Hashable, hadamard: bool
    ) -> _Entry | None:
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        key = (x._version, spec, dtype, group, hadamard)
        entry = self.entry
        if entry is None or entry.source() is not x or entry.key != key:
            self.entry = entry = _Entry(weakref.ref(x, self._forget), key)
        return entry

    def _forget(self, source: weakref.ref) -> None:
        if self.entry is not None and self.entry.source is source:
            self.entry = None


def _values(
    x: torch.Tensor, spec: TensorSpec | None, dtype: torch.dtype, divisor: torch.Tensor | None, hadamard: bool
) -> torch.Tensor:
    if spec is None:
        return ops.transform(x, dtype) if hadamard else x.to(dtype)
    return ops.fake_quantize(x, spec.format.name, spec.rule, dtype, divisor, hadamard)
