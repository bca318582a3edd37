"""Inject N faults into training runs, continue each run, and count those that end as if nothing had happened.

    python tests/faults/soak.py 25 --seed 0

A run has survived when the same command, given again, ends with the same weights, bit for bit, the same losses and
learning rates as an uninterrupted run, and leaves nothing behind. Kinds of faults take turns; where one strikes
is drawn.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from faults.kinds import KINDS, Lost, Reference  # noqa: E402
from faults.runs import make_workspace  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402


def main() -> int:
    """Returns the number of faults not survived."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=25, help="faults to inject (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which they strike (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the folder of runs that were lost")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    lost = soak(arguments.count, random.Random(arguments.seed), make_workspace(folder))
    print(f"{time.monotonic() - began:.0f} seconds, seed {arguments.seed}")
    if lost and arguments.keep:
        print(f"runs are kept in {folder}")
    else:
        shutil.rmtree(folder)
    print(f"{arguments.count} faults injected, {arguments.count - lost} survived, {lost} lost")
    return lost


def soak(count: int, draw: random.Random, workspace: Path) -> int:
    """Inject `count` faults below `workspace`; returns how many runs were lost."""
    references, lost = {}, 0
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name = draw.choice(kind.variants)
        if name not in references:
            print(f"uninterrupted run: {name} ... ", end="", flush=True)
            references[name] = Reference.make(workspace, name)
            print(f"{references[name].seconds:.1f} s")
        job = references[name].job(f"{number + 1}-{kind.name}")
        began = time.monotonic()
        print(f"[{number + 1}/{count}] {name}: ", end="", flush=True)
        try:
            kind.inject(job, references[name], draw)
            verdict = "survived"
            shutil.rmtree(job.output, ignore_errors=True)
        except (Lost, AssertionError, TimeoutError) as error:
            lost += 1
            verdict = f"LOST: {error}"
        print(f" -> {verdict} ({time.monotonic() - began:.1f} s)", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
