"""The processes of a run that share an output folder: which one leads, who reads which files, and messages."""

from __future__ import annotations

import os
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments


@dataclass(frozen=True)
class Writers:
    """This process among those that write to the same folder.

    Attributes:
        index, count: its number, and how many there are.
        leads: whether it makes and renames folders for all of them.
    """

    index: int = 0
    count: int = 1
    leads: bool = True

    @classmethod
    def of(cls, args: TrainingArguments) -> Writers:
        """All processes, or those of this machine where each machine has a folder of its own."""
        if args.world_size <= 1:
            return cls()
        if args.save_on_each_node:
            return cls(args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), args.should_save)
        return cls(args.process_index, args.world_size, args.should_save)

    def wait(self) -> None:
        """Wait until every process of the run is here."""
        if PartialState._shared_state:
            PartialState().wait_for_everyone()

    def gather(self, item) -> list:
        """The items of all processes of the run, in the same order everywhere; pickled among them, never from disk."""
        return gather_object([item]) if PartialState._shared_state else [item]
