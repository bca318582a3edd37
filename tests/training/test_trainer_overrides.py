"""Private parts of transformers and accelerate are what the trainers here were written for."""

from __future__ import annotations

import importlib
import inspect

import pytest
from transformers import Trainer

from training.trainer import QATTrainer
from training.trainer_overrides import INTERNALS, OVERRIDES, signature_of

OURS = QATTrainer.__mro__[: QATTrainer.__mro__.index(Trainer)]


def test_every_private_override_is_in_the_table_once():
    names = {name for cls in OURS for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert sorted(name for name in names if hasattr(Trainer, name)) == sorted(o.name for o in OVERRIDES)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda o: o.name)
def test_an_override_was_written_for_the_installed_signature_and_accepts_the_same_calls(override):
    installed = getattr(Trainer, override.name)
    assert signature_of(installed) == override.signature, f"written for transformers {override.version}"
    names = list(inspect.signature(installed).parameters)
    required = [n for n, p in inspect.signature(installed).parameters.items() if p.default is p.empty]
    for cls in OURS:
        if override.name in vars(cls):
            ours = inspect.signature(vars(cls)[override.name])
            ours.bind(*names)
            ours.bind(*required)
            ours.bind("self", **dict.fromkeys(names[1:]))


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda i: i.name)
def test_a_private_part_is_where_it_was(internal):
    module, _, rest = internal.owner.rpartition(".")
    try:
        owner = importlib.import_module(internal.owner)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(module), rest)
    assert internal.name in inspect.getsource(owner), f"written for {internal.version}"
    if internal.signature is not None:
        assert signature_of(getattr(owner, internal.name)) == internal.signature
