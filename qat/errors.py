"""Errors that are not faults of this program, and how a program reports them: in one line on standard error."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .processes import begin_line, ended_by_signals

STATUS = 2  # of argparse, too
FAULT_STATUS = 1  # the command was right: it may succeed when it is given again
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEAD_START_S = 5  # how long the other processes leave the line to the first one; a launcher ends them meanwhile


class UserError(ValueError):
    """An argument, a file, a folder or data of the user that cannot be used.

    The message names the argument, its value, the choices and the remedy. Our own invariants are assertions.
    """


class RunFault(Exception):
    """What ends a run whose command is right, such as a full disk or a loss of NaN. The message names the remedy."""


class DiskFullError(RunFault, OSError):
    """There is no space left for what a run writes; nothing incomplete was left there."""


@contextmanager
def reported_in_one_line() -> Iterator[None]:
    """End the program with `error: MESSAGE`: status 2 for a UserError, 1 for a RunFault or a full disk.

    Other errors pass. SIGTERM and Ctrl-C end the program with status 143 and 130 (see `ended_by_signals`).

    Under a launcher, which ends all processes with the first that fails, process 0 reports. Another process does so
    only if it is still there after some seconds: then the error is its own.
    """
    with ended_by_signals():
        try:
            yield
        except UserError as error:
            report(error)
            sys.exit(STATUS)
        except (RunFault, OSError) as error:
            if not isinstance(error, RunFault) and error.errno not in DISK_FULL:
                raise
            report(error)
            sys.exit(FAULT_STATUS)


def report(error: BaseException | str) -> None:
    """Print `error: MESSAGE` in one line on standard error; see `reported_in_one_line`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_HEAD_START_S)
    begin_line()
    prefix = "error" if rank == "0" else f"error in process {rank}"
    print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
