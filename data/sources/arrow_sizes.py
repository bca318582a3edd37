"""How many bytes each row of an Arrow batch stands for, measured before any Python object is made of it.

The size of Arrow's buffers is no measure: a dictionary, a view or a run can name one text of megabytes many times.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

_FIXED_BYTES = 8


def may_repeat(kind: pa.DataType) -> bool:
    """Whether an array of this type may hold more values than its buffers have bytes for."""
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind) or _is_view(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return may_repeat(kind.storage_type)
    return any(may_repeat(kind.field(i).type) for i in range(kind.num_fields))


def row_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """int64 [rows]: texts count by their length, other values 8 bytes each."""
    return sum(map(_value_bytes, batch.columns), np.zeros(batch.num_rows, np.int64))


def _value_bytes(values: pa.Array) -> np.ndarray:
    """int64 [values]"""
    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        return _value_bytes(values.storage)
    if types.is_dictionary(kind):
        indices = np.asarray(pc.fill_null(values.indices, 0).to_numpy(zero_copy_only=False), np.int64)
        return _value_bytes(values.dictionary)[indices] if len(values.dictionary) else np.zeros(len(values), np.int64)
    if types.is_run_end_encoded(kind):
        ends = values.run_ends.to_numpy(zero_copy_only=False)
        runs = np.searchsorted(ends, np.arange(values.offset, values.offset + len(values)), side="right")
        return _value_bytes(values.values)[runs]
    if types.is_struct(kind):
        return sum(map(_value_bytes, values.flatten()), np.zeros(len(values), np.int64))
    if types.is_map(kind):
        return _ranges(values, _value_bytes(values.keys) + _value_bytes(values.items))
    if types.is_nested(kind) and kind.num_fields == 1:
        return _ranges(values, _value_bytes(values.values))
    if types.is_string_view(kind) or types.is_binary_view(kind):
        lengths = np.frombuffer(values.buffers()[1], np.int32)[::4][values.offset :][: len(values)]  # of 16-byte views
        return np.where(values.is_null().to_numpy(zero_copy_only=False), 0, lengths).astype(np.int64)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(len(values), _FIXED_BYTES, np.int64)


def _ranges(lists: pa.Array, sizes: np.ndarray) -> np.ndarray:
    """Sums of `sizes`, those of all elements, over the elements of each list."""
    if types.is_fixed_size_list(lists.type):
        starts = (np.arange(len(lists)) + lists.offset) * lists.type.list_size
        ends = starts + lists.type.list_size
    elif types.is_list_view(lists.type) or types.is_large_list_view(lists.type):
        starts = lists.offsets.to_numpy(zero_copy_only=False)
        ends = starts + lists.sizes.to_numpy(zero_copy_only=False)
    else:
        offsets = lists.offsets.to_numpy(zero_copy_only=False)
        starts, ends = offsets[:-1], offsets[1:]
    is_empty = lists.is_null().to_numpy(zero_copy_only=False) | (starts == ends)
    before = np.concatenate([[0], np.cumsum(sizes)])
    return before[np.where(is_empty, 0, ends)] - before[np.where(is_empty, 0, starts)]


def _is_view(kind: pa.DataType) -> bool:
    checks = (types.is_string_view, types.is_binary_view, types.is_list_view, types.is_large_list_view)
    return any(check(kind) for check in checks)
