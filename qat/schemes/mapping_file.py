"""A file that maps layers to schemes: what `training.sensitivity` writes and `prepare_qat` takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_file import read_json
from .patterns import check_patterns
from .presets import scheme_name

DEFAULT_IGNORE = ("lm_head",)
_MEASURED = ("smooth_alpha", "input_transform", "scale_rules")  # how the mapping came about
_READ = ("mapping", "ignore", *_MEASURED)


def with_patterns(ignore: Iterable[str], more: Iterable[str] | None) -> tuple[str, ...]:
    """Layers to ignore and those that --ignore adds, each pattern once."""
    return tuple(dict.fromkeys((*ignore, *(more or ()))))


def load_mapping(path: str | Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read a JSON file: {"mapping": {KEY: SCHEME, ...}, "ignore": [PATTERN, ...]}, or the inner mapping alone.

    Other keys beside these two, such as how the mapping came about, are left alone, unless they look like a slip. Later
    entries of the mapping win.

    Returns:
        The mapping and the layers to ignore (default: lm_head), as `prepare_qat` takes them.

    Raises:
        UserError: the file does not exist, is not JSON, or holds something else.
    """
    content = _read(path)
    expected = 'expected {"mapping": {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}, "ignore": ["lm_head"]}'
    if isinstance(content, dict) and isinstance(content.get("ignore"), list) and "mapping" not in content:
        raise UserError(f'the mapping file {str(path)!r} has "ignore" beside layers, and no "mapping"; {expected}')
    mapping = content.get("mapping", content) if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(value, str) for value in mapping.values()):
        raise UserError(f"the mapping file {str(path)!r} holds no mapping from layers to schemes; {expected}")
    try:
        mapping = {key: scheme_name(value) for key, value in mapping.items()}
    except UserError as error:
        raise UserError(f"the mapping file {str(path)!r}: {error}") from error
    if "mapping" in content:
        _check_spelling(path, content)
    ignore = content.get("ignore", list(DEFAULT_IGNORE))
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise UserError(f'the mapping file {str(path)!r}: "ignore" is not a list of patterns; {expected}')
    check_patterns([*mapping, *ignore])
    return mapping, tuple(ignore)


def _check_spelling(path: str | Path, content: dict) -> None:
    """Raise a UserError for a key that is nearly one of those which are read."""
    for key in content:
        near = difflib.get_close_matches(key, _READ, 1, 0.8)
        if near and key not in _READ:
            raise UserError(f"the mapping file {str(path)!r} has the key {key!r}, which is not read; say {near[0]!r}")


def load_measurement(path: str | Path) -> dict[str, object]:
    """Under which settings the mapping of a file that `load_mapping` accepts was measured.

    Returns:
        "smooth_alpha", a number or "auto", "input_transform", a name, and "scale_rules", {SCHEME: {"weight": RULE,
        "input": RULE}}, each if the file records it; one that was written by hand need not.

    Raises:
        UserError: one of them is something else.
    """
    content = _read(path)
    found = {key: content[key] for key in _MEASURED if "mapping" in content and key in content}
    alpha, transform = found.get("smooth_alpha", 0), found.get("input_transform", "none")
    is_known = (isinstance(alpha, int | float) or alpha == "auto") and isinstance(transform, str)
    if not is_known or not isinstance(found.get("scale_rules", {}), dict):
        expected = (
            '"smooth_alpha": 0.7, "input_transform": "hadamard", "scale_rules": {"MXFP4": {"weight": "search", '
            '"input": "even"}}'
        )
        raise UserError(f"the mapping file {str(path)!r} records {found}; expected {expected}, or none of them")
    return found


def _read(path: str | Path) -> Any:
    """The file's JSON content, of any type; UserError if it is not JSON."""
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"the mapping file {str(path)!r} cannot be read: {error}") from error
