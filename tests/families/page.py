"""The table of docs/architectures.md, written from the results of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import transformers
from helpers import ROOT

from .entries import BESIDE, PROVEN, SURVEYED, WEIGHTS_PROVEN, has_vision
from .expected import EXPECTED
from .trial import Result

PAGE = ROOT / "docs" / "architectures.md"
_START, _END = "<!-- results -->", "<!-- end of results -->"
_PROOF = {PROVEN: "bit-equal", WEIGHTS_PROVEN: "weights only"}


def write(results: dict[str, Result], page: Path = PAGE) -> None:
    """Replace what stands between the two marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(_START)
    page.write_text(before + _START + "\n" + table(results) + _END + rest.split(_END)[1], encoding="utf-8")


def table(results: dict[str, Result]) -> str:
    """Counts, and a row for each entry: surveyed families first, then the others."""
    surveyed = [results[entry] for entry in SURVEYED if entry in results]
    others = [result for entry, result in results.items() if entry not in SURVEYED]
    lines = [f"transformers {transformers.__version__}.", ""]
    lines += [f"* {_count(chosen, what)}" for chosen, what in ((surveyed, "surveyed"), (others, "other")) if chosen]
    for title, chosen in (("Surveyed families", surveyed), ("Other families", others)):
        lines += ["", f"### {title}", "", "| family | quantized | smoothed activations | proof | notes |"]
        lines += ["|---|---|---|---|---|", *(_row(result) for result in chosen)]
    return "\n".join(lines) + "\n"


def _count(results: list[Result], what: str) -> str:
    counts = Counter(result.outcome for result in results)
    folders = counts[PROVEN] + counts[WEIGHTS_PROVEN]
    rest = len(results) - folders
    return (
        f"{folders} of {len(results)} {what} families end in a proven folder: {counts[PROVEN]} with bit-equal logits, "
        f"{counts[WEIGHTS_PROVEN]} whose logits transformers cannot compute. "
        f"The other {rest} {'does' if rest == 1 else 'do'} not."
    )


def _row(result: Result) -> str:
    share = "" if result.share is None else f"{result.share:.1%}"
    notes = [_notes(result)] if result.outcome != PROVEN else []
    notes += ["after `scripts/text_model.py`"] if result.entry in BESIDE else []
    notes += ["vision-language folder"] if has_vision(result.entry) and result.entry not in BESIDE else []
    cells = (f"`{result.entry}`", share, result.smoothed, _PROOF.get(result.outcome, result.outcome), "; ".join(notes))
    return f"| {' | '.join(cells)} |"


def _notes(result: Result) -> str:
    if result.entry in EXPECTED:
        return EXPECTED[result.entry].reason
    return re.sub(r"/\S*/", "", result.message)[:160].replace("|", "/")
