"""The table of accuracy.py: which rows are there, what they recover, and the CSV."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import write_text
from qat.errors import UserError

BF16, FLOOR = "bf16", "MXFP4-floor-floor"  # the rows that recover all and none of the loss
ABOUT = ("device", "threads", "versions", "date", "command")  # of a row, see benchmarks.report.environment


def check_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Note the texts of the columns in `out/texts.json`, by their SHA-256.

    Raises:
        UserError: rows in `out` were measured on another text of the same name.
    """
    path = out / "texts.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    found = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    for name, digest in found.items():
        if noted.get(name, digest) != digest:
            what = "the installed packages' descriptions" if name == "foreign" else f"--{name}"
            raise UserError(
                f"--out {out} has rows that were measured on another text for the column {name!r} ({what}); give "
                "another folder, or the text that they were measured on"
            )
    write_text(path, json.dumps(noted | found))


def finished_rows(out: Path, keys: list[str]) -> list[dict]:
    """The rows that have finished, in order, with the fraction of the loss that they recover on each text."""
    ends = {end: json.loads((out / f"{end}.json").read_text()) for end in (FLOOR, BF16) if is_done(out, end)}
    rows = [json.loads((out / f"{key}.json").read_text()) | {"row": key} for key in keys if is_done(out, key)]
    for row in rows:
        for name in [name for name in row if name.endswith("perplexity")]:
            floor, bf16 = (math.log(ends.get(end, {}).get(name, math.nan)) for end in (FLOOR, BF16))
            row[name.replace("perplexity", "recovered")] = (floor - math.log(row[name])) / (floor - bf16)
    return rows


def is_done(out: Path, key: str, texts: Sequence[str] = ()) -> bool:
    """Whether a row was measured, on these texts too."""
    path = out / f"{key}.json"
    return path.exists() and all(f"{text}_kl" in json.loads(path.read_text()) for text in texts)


def print_table(rows: list[dict]) -> None:
    """Print one line for each row: perplexity, recovered fraction and KL, in domain and on each text."""
    texts = [name.removesuffix("perplexity") for name in (rows[0] if rows else {}) if name.endswith("perplexity")]
    print(
        f"{'':<62}"
        + "".join(f"{text.strip('_') or 'domain':>8}{'recov.':>8}{'KL':>7}" for text in texts)
        + "  steps     s"
    )
    for row in rows:
        title = row["title"] + (f" (seed {row['seed']})" if "@" in row["row"] else "")
        figures = (
            f"{row.get(f'{text}perplexity', math.nan):>8.2f}{row.get(f'{text}recovered', math.nan):>8.1%}"
            f"{row.get(f'{text}kl', math.nan):>7.3f}"
            for text in texts
        )
        print(f"{title:<62}{''.join(figures)}{row['steps']:>7}{row['seconds']:>6.0f}")


def write_csv(rows: list[dict], path: Path) -> None:
    """Write the rows, each with the device, versions, date and command of its own call."""
    texts = [f"{text}_{key}" for text in ("foreign", "generic", "never") for key in ("perplexity", "recovered", "kl")]
    texts = [name for name in texts if any(name in row for row in rows)]
    names = ["row", "title", "seed", "perplexity", "recovered", "kl", "agreement", *texts, "steps", "labelled_tokens",
             "seconds", *ABOUT]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            digits = {name: f"{row[name]:.4g}" for name in names if isinstance(row.get(name), float)}
            writer.writerow({name: row[name] for name in names if name in row} | digits)
