"""Cores of a machine while one process reads the weights and the others wait."""

from __future__ import annotations

import os

import pytest
import torch

from training.backends import sharding


@pytest.mark.parametrize("loads, waits, has_all", [(True, False, True), (True, True, False), (False, False, False)])
def test_only_the_process_that_loads_alone_takes_all_cores_and_gives_them_back(monkeypatch, loads, waits, has_all):
    monkeypatch.setattr(sharding, "first_process_loads", lambda: loads)
    monkeypatch.setattr(sharding, "waits_for_weights", lambda: waits)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(RuntimeError, match="inside"), sharding.cores_of_waiting_processes():
            assert torch.get_num_threads() == (3 if has_all else 1)
            raise RuntimeError("inside")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
