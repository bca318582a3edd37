"""What readers of files yield, and the limits that they keep."""

from __future__ import annotations

from ..bad_samples import BadSample, shorten

MAX_LINE_BYTES = 8 * 2**20  # a longer line, row or cell is not a conversation; it is never held as Python objects
TURN_KEYS = ("role", "from")  # an object with one of these keys is a turn of a conversation, not a row

Row = tuple[str, "dict | BadSample"]  # the place, then what stands there


def checked_object(value: object, place: str) -> dict | BadSample:
    """`value` if it is an object, else the bad sample that says what it is."""
    return value if isinstance(value, dict) else BadSample("wrong type", f"{shorten(value)} is not an object", place)


def overlong(size: float, place: str, what: str = "") -> BadSample:
    """The bad sample for `size` bytes where `MAX_LINE_BYTES` are allowed."""
    detail = f"{what}{size / 2**20:.1f} MiB, the limit is {MAX_LINE_BYTES / 2**20:g}; split the document"
    return BadSample("overlong line", detail, place)
