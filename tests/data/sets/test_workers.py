"""Workers that tokenize: results in order, errors come through, and none of them is left."""

from __future__ import annotations

import os
import signal
import time

import pytest

from data.sets.workers import Workers
from qat.errors import RunFault, UserError


def _double(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return 2 * number


def _fail_at_five(number: int) -> bytes:
    if number == 5:
        raise UserError("the fifth")
    return bytes(1 << 20)  # more than a pipe holds


def _kill_at_five(number: int) -> bytes:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(1 << 20)


def test_results_come_in_the_order_of_the_items():
    with Workers(_double, 3) as workers:
        assert list(workers.map(range(20))) == [2 * number for number in range(20)]
    assert not any(process.is_alive() for process in workers._processes)


@pytest.mark.parametrize(
    "function,error,message",
    [(_fail_at_five, UserError, "^the fifth$"), (_kill_at_five, RunFault, "was killed.*--preprocessing_num_workers")],
)
def test_an_error_or_the_death_of_a_worker_ends_all_of_them(function, error, message):
    workers = Workers(function, 2)
    with pytest.raises(error, match=message), workers:
        for _ in workers.map(range(100)):
            pass
    assert not any(process.is_alive() for process in workers._processes)


def test_a_reader_that_stops_early_ends_workers_that_are_writing():
    with Workers(_fail_at_five, 2) as workers:
        next(workers.map(range(100)))
        time.sleep(0.1)
    assert not any(process.is_alive() for process in workers._processes)
