"""Workers of data loaders that outlive a SIGTERM to all processes, so that the step that it finds can end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.data import DataLoader

from qat.processes import end_by_parent_alone


@dataclass(frozen=True)
class _LastingWorker:
    """What a worker of a data loader does first: see `end_by_parent_alone`; then `initialize`."""

    parent: int
    initialize: Callable[[int], None] | None

    def __call__(self, number: int) -> None:
        end_by_parent_alone(self.parent)
        if self.initialize is not None:
            self.initialize(number)


def with_lasting_workers(loader: DataLoader) -> DataLoader:
    """`loader`, whose workers end with this process only."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate 1.15 wraps the one that starts the workers
    if inner.num_workers and not isinstance(inner.worker_init_fn, _LastingWorker):
        inner.worker_init_fn = _LastingWorker(os.getpid(), inner.worker_init_fn)
    return loader
