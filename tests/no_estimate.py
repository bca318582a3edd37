"""Runs of main.py that log no estimate of their memory: its step on fake tensors takes as long as a tiny run trains.

An estimate that fails is logged and ends no run, so that these runs would not test it; tests/training/estimate does.
"""

from __future__ import annotations

from typing import NoReturn

import main  # noqa: F401  # first: it imports nearly all that tests do, without collecting garbage meanwhile
from training.estimate import program
from training.estimate.dry_run import NotOnFakeTensors


def leave_out() -> None:
    """In this process, from now on."""
    program.estimator_of = _refuse


def _refuse(*_args: object) -> NoReturn:
    raise NotOnFakeTensors("left out by tests/no_estimate.py")
