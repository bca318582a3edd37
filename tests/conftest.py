"""What holds for every test."""

from __future__ import annotations

import no_estimate
import pytest

from training.estimate import program


@pytest.fixture(scope="session", autouse=True)
def runs_without_estimate():
    """Runs of main.py in this process, also those of fixtures of modules."""
    estimator_of = program.estimator_of
    no_estimate.leave_out()
    yield
    program.estimator_of = estimator_of
