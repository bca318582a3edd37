"""UserError, and how a program reports it: one line on standard error and exit status 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 2  # of argparse, too
_HEAD_START_S = 5  # how long the other processes leave the line to the first one; a launcher ends them meanwhile


class UserError(ValueError):
    """An argument, a file, a folder or data of the user that cannot be used.

    The message names the argument, its value, the choices and the remedy. Our own invariants are assertions.
    """


@contextmanager
def reported_in_one_line() -> Iterator[None]:
    """End the program with `error: MESSAGE` and status 2 if a UserError is raised inside; other errors pass.

    Under a launcher, which ends all processes with the first that fails, process 0 reports. Another process does so
    only if it is still there after some seconds: then the error is its own.
    """
    try:
        yield
    except UserError as error:
        report(error)
        sys.exit(STATUS)


def report(error: BaseException | str) -> None:
    """Print `error: MESSAGE` in one line on standard error; see `reported_in_one_line`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_HEAD_START_S)
    prefix = "error" if rank == "0" else f"error in process {rank}"
    print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
