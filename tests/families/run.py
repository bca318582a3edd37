"""Sweep over every causal family of transformers, one tiny model each:

python tests/families/run.py                          # all of them; --surveyed: the 79 of docs/architectures.md
python tests/families/run.py mixtral --keep DIR       # one, its model, log and output kept in DIR/mixtral
python tests/families/run.py mamba -- --smooth_alpha 0    # what follows -- goes to main.py
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from processes import fork  # noqa: E402

from families import page  # noqa: E402
from families.entries import SURVEYED, entries  # noqa: E402
from families.expected import EXPECTED  # noqa: E402
from families.trial import FAILED, PROVEN, Result, attempt  # noqa: E402

SECONDS = 150  # for one entry


def main(argv: list[str] | None = None) -> int:
    """Run the entries one after another; 0 if each one came out as expected."""
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", help="names; default: all")
    parser.add_argument("--surveyed", action="store_true", help="the 79 that the goal counts")
    parser.add_argument("--keep", type=Path, help="keep the entries' folders here")
    parser.add_argument("--results", type=Path, help="a JSON file that keeps the results, added to if it is there")
    parser.add_argument("--write", action="store_true", help="write the table of docs/architectures.md from --results")
    parser.add_argument("--missing", action="store_true", help="only entries that --results has not yet")
    args = parser.parse_args(own)
    unknown = set(args.entries) - set(entries())
    if unknown:
        parser.error(f"no such entries: {', '.join(sorted(unknown))}; there are: {', '.join(entries())}")
    if args.write:
        page.write(_read(args.results))
        return 0
    chosen = args.entries or (SURVEYED if args.surveyed else entries())
    results = _read(args.results)
    wrong = []
    for entry in chosen:
        if args.missing and entry in results:
            continue
        results[entry] = result = run(entry, args.keep, tuple(flags))
        complaint = "" if flags else complaint_about(result)
        wrong += [entry] if complaint else []
        print(describe(result, complaint), flush=True)
        _write(args.results, results)
    ran = [results[entry] for entry in chosen if entry in results]
    print(summary(ran), f"unexpected: {', '.join(wrong) or 'none'}", sep="\n")
    return 1 if wrong else 0


def run(entry: str, keep: Path | None = None, flags: tuple[str, ...] = (), seconds: float = SECONDS) -> Result:
    """Run one entry in a process of its own, ended after `seconds`."""
    with tempfile.TemporaryDirectory(prefix="families-") as temporary:
        folder = Path(keep or temporary).resolve() / entry
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        began = time.monotonic()
        process = fork(attempt, entry, str(folder), flags)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        result = Result.read(folder)
        if process.exitcode:
            ended = "took too long" if time.monotonic() - began >= seconds else f"ended with status {process.exitcode}"
            result.outcome, result.message = FAILED, f"its process {ended}"
        result.seconds = round(time.monotonic() - began, 1)
        result.save(folder)
        return result


def complaint_about(result: Result) -> str:
    """What is unexpected about a result; empty if nothing is."""
    expected = EXPECTED.get(result.entry)
    if expected is None:
        remedy = "correct it, add it to tests/families/expected.py, or its sizes to tests/families/configs.py"
        return "" if result.outcome == PROVEN else f"expected to be proven: {remedy}"
    if result.outcome != expected.outcome or not re.search(expected.pattern, result.message):
        return f"expected: {expected.outcome}, {expected.pattern!r}; change tests/families/expected.py"
    return ""


def describe(result: Result, complaint: str = "") -> str:
    """One line about a result, and one about what is unexpected."""
    share = "" if result.share is None else f"  {result.share:.1%} quantized"
    smoothed = f"  smoothed {result.smoothed}" if result.smoothed else ""
    message = f"  [{result.stage}] {result.message[:400]}" if result.message else ""
    line = f"{result.entry:22} {result.outcome.upper():14}{result.seconds:5.1f} s{share}{smoothed}{message}"
    return line + (f"\n    UNEXPECTED: {complaint}" if complaint else "")


def summary(results: list[Result]) -> str:
    """Counts of outcomes, over all entries and over the surveyed ones."""
    lines = []
    for what, chosen in (("entries", results), ("surveyed", [r for r in results if r.entry in SURVEYED])):
        counts = Counter(result.outcome for result in chosen)
        lines.append(f"{len(chosen)} {what}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
    return "\n".join(lines)


def _read(path: Path | None) -> dict[str, Result]:
    if path is None or not path.exists():
        return {}
    return {name: Result(**value) for name, value in json.loads(path.read_text()).items()}


def _write(path: Path | None, results: dict[str, Result]) -> None:
    if path is not None:
        path.write_text(json.dumps({name: asdict(result) for name, result in results.items()}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
