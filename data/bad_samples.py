"""Bad samples: the run ends with the file and line of the first one, or skips and counts them."""

from __future__ import annotations

import reprlib
from collections import Counter
from dataclasses import dataclass, field

from qat.errors import UserError

POLICIES = ("error", "skip")
SHOWN = 3  # skipped samples that are shown in full


class BadSample(UserError):
    """One sample (or one file) that cannot be used: `kind` is what is counted, `detail` what is particular to it."""

    def __init__(self, kind: str, detail: str = "", place: str = "") -> None:
        super().__init__(kind, detail, place)
        self.kind, self.detail, self.place = kind, detail, place

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.kind, self.detail) if part)

    def at(self, place: str) -> BadSample:
        """The same fault, found at `place` ("file:line")."""
        return BadSample(self.kind, self.detail, place)


@dataclass
class BadSamplePolicy:
    """`--on_bad_sample`: "error" raises at the first bad sample, "skip" counts all and remembers the first three."""

    policy: str = "error"
    counts: Counter = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    unread: Counter = field(default_factory=Counter)  # names of fields that say nothing to the model

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"--on_bad_sample {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}")

    def handle(self, error: BadSample) -> None:
        """Count `error`, or raise it as the ValueError that ends the run."""
        if self.policy == "error":
            raise UserError(f"{error}. Fix the data, or set --on_bad_sample skip to skip and count such samples")
        self.counts[error.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def note_unread(self, names: set[str]) -> None:
        """Count a sample of which the fields `names` are not read, as they say nothing to the model."""
        if names:
            self.unread.update(names)

    def unread_report(self) -> str:
        """One line of the fields that are not read; empty if there are none."""
        if not self.unread:
            return ""
        names = [f"{shorten(name)} ({count:,})" for name, count in self.unread.most_common(12)]
        more = f", and {len(self.unread) - 12} more" if len(self.unread) > 12 else ""
        return f"fields that are not read, by number of samples: {', '.join(names)}{more}"

    @property
    def total(self) -> int:
        """How many samples were skipped."""
        return sum(self.counts.values())

    def report(self) -> str:
        """One line of counts, then the first three; empty if nothing was skipped."""
        if not self.total:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        return "\n  ".join([f"skipped {self.total} bad samples: {kinds}; the first are", *self.first])


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 60, 60


def shorten(value: object, limit: int = 60) -> str:
    """`value` as messages show it: one line, quoted, at most `limit` characters."""
    text = _REPR.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
