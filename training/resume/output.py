"""OutputFolder: the folder that a run writes to, from the lock at its start to the packed model at its end."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from qat import QATConfig
from qat.checkpoints.model_card import CardFacts
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import is_packed
from qat.checkpoints.verdict import withdraw
from qat.checkpoints.verify import verify
from qat.errors import DiskFullError, UserError
from qat.files.atomic import check_target, clear_leftovers, means_full
from qat.files.json_file import read_object
from qat.files.lock import LOCK_NAME, locked
from qat.files.paths import made_writable
from qat.schemes.config import QAT_CONFIG_NAME

from ..backends.writers import Writers
from .checkpoints import check_resumable, find_checkpoint
from .written import BASE_FOLDER, MODEL_PARTIAL, checkpoints_in

logger = logging.getLogger(__name__)

# transformers does not write these through a temporary folder
_STATE = "trainer_state.json"
_FIGURES = ("all_results.json", "train_results.json", "eval_results.json")
_RESULTS = (*_FIGURES, _STATE)
_REPORT = ("report.md", "report.png")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


class OutputFolder:
    """The folder that a run writes to: locked while it lasts, with its checkpoints, its model and the packed model.

    Args:
        path: the folder.
        writers: the processes that write there.
    """

    def __init__(self, path: str | Path, writers: Writers) -> None:
        self.path, self.writers = Path(path), writers

    @classmethod
    def of(cls, args: TrainingArguments) -> OutputFolder:
        """The folder of a run; that of an evaluation is a new one inside where `args.output_dir` is not empty."""
        if not args.saves:
            args.output_dir = str(unused_folder(args.output_dir))
        return cls(args.output_dir, Writers.of(args))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder for this run alone: made if it is missing, tried, locked, cleared of what killed runs left.

        A run that is refused, or fails, before it has written anything leaves no folder that it made.

        Raises:
            UserError: nothing can be written there, or another run is writing there.
            DiskFullError: no space is left, whatever was being written.
        """
        with made_writable("--output_dir", self.path), locked(self.path, self.writers):
            self._clear()
            try:
                yield
            except Exception as error:
                if not (isinstance(error, DiskFullError) or means_full(error)):
                    raise
                self._clear()
                raise self._disk_full(error) from (None if isinstance(error, DiskFullError) else error)

    def _disk_full(self, error: Exception) -> DiskFullError:
        """The error itself if it names a place, or else where the space is likely to be missing."""
        if isinstance(error, DiskFullError):
            return error
        free = shutil.disk_usage(self.path).free / 2**20
        return DiskFullError(
            f"the disk is full ({error}), most likely that of --output_dir {str(self.path)!r}, which has {free:,.1f} "
            "MiB free; what is complete there stays. Free some space and give the same command again"
        )

    def _clear(self) -> None:
        """Remove what another process left incomplete, or this one on a full disk."""
        for path in sorted(self.path.iterdir()) if self.writers.leads else ():
            _clear(path)

    def find_checkpoint(
        self, args: TrainingArguments, qat_config: QATConfig | None, has_adapters: bool = False
    ) -> str | None:
        """The checkpoint that a training resumes from, see `checkpoints.find_checkpoint`; None in an evaluation."""
        if not args.do_train:
            return None
        return find_checkpoint(str(self.path), args.resume_from_checkpoint, qat_config, self.writers, has_adapters)

    def check_resumable(
        self, args: TrainingArguments, qat_config: QATConfig | None, has_adapters: bool = False
    ) -> str | None:
        """Refuse, before weights are read, a checkpoint to resume from that is not there or of another training.

        Returns:
            See `checkpoints.check_resumable`.

        Raises:
            UserError: see `checkpoints.check_resumable`.
        """
        return check_resumable(str(self.path), args.resume_from_checkpoint, qat_config, has_adapters)

    def check_replaceable(self) -> None:
        """Refuse to write over a model that no run wrote as its result.

        Raises:
            UserError: the folder is packed, or has weights beside which nothing is that a run writes.
        """
        if is_packed(self.path):
            raise UserError(
                f"--output_dir {str(self.path)!r} is a packed folder, which this run would write over; give another one"
            )
        ours = any((self.path / name).exists() for name in (_STATE, QAT_CONFIG_NAME)) or checkpoints_in(self.path)
        weights = sorted(path.name for kind in _WEIGHTS for path in self.path.glob(kind))
        if weights and not ours:
            raise UserError(
                f"--output_dir {str(self.path)!r} has a model that no training here wrote ({weights[0]}), which this "
                "run would replace; give another --output_dir, or move that model away"
            )

    def check_untrained(self) -> None:
        """Refuse to write a model that was not trained over one that was.

        Raises:
            UserError: the folder has checkpoints, or the model of a training.
        """
        state = self.path / _STATE
        steps = read_object(state).get("global_step") if state.is_file() else 0
        if steps or checkpoints_in(self.path):
            raise UserError(
                f"--ptq True: --output_dir {str(self.path)!r} has a model that was trained, or its checkpoints; give "
                "another --output_dir"
            )

    def forget_last_model(self, packs: QATConfig | None) -> None:
        """Remove figures and report of the model that is going to be replaced, and name packed folders that stay.

        Figures of a run are merged into `all_results.json`, and a packed model's card publishes them.

        Args:
            packs: the quantization of the model that replaces it, if it is going to be packed.
        """
        if not self.writers.leads:
            return
        for name in (*_FIGURES, *_REPORT):
            (self.path / name).unlink(missing_ok=True)
        replaced = None if packs is None else self._packed(packs)
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir() and path != replaced):
            with suppress(UserError):  # a damaged config.json
                if is_packed(folder):
                    logger.warning(
                        "%s was packed before this run, from another model than this run's; it stays", folder
                    )

    def withdraw_proof(self, qat_config: QATConfig) -> None:
        """Take back the proof of the packed model that `pack` is going to replace: its source is about to change."""
        withdraw(self._packed(qat_config))

    def check_packable(self, qat_config: QATConfig) -> None:
        """Refuse, before training, what `pack` would refuse to replace.

        Raises:
            UserError: a file, or a folder without a checkpoint, is where the packed model goes.
        """
        try:
            check_target(self._packed(qat_config), overwrite=True)
        except UserError as error:
            raise UserError(f"--output_dir {str(self.path)!r}: {error}, or give another --output_dir") from error

    def _packed(self, qat_config: QATConfig) -> Path:
        """The folder of the packed model, named after its schemes."""
        return self.path / "-".join(dict.fromkeys(qat_config.mapping.values()))

    def pack(
        self, qat_config: QATConfig, export_format: str, facts: CardFacts, trust_remote_code: bool = False
    ) -> Path:
        """Pack the model of this folder into a folder named after its scheme, and prove that it is the same model."""
        target = self._packed(qat_config)
        export_checkpoint(
            self.path, target, export_format, overwrite=True, facts=facts, trust_remote_code=trust_remote_code
        )
        verify(target, self.path, trust_remote_code=trust_remote_code)
        return target


def release(trainer: Trainer) -> None:
    """Let go of what a finished training holds beside its weights, so that a GPU has room for the proof."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()


def unused_folder(folder: str | Path) -> Path:
    """`folder` if it is free, else a new folder inside it."""
    path, number = Path(folder), 0
    while path.is_dir() and any(child.name != LOCK_NAME for child in path.iterdir()):
        number += 1
        path = Path(folder, f"evaluation-{number}")
    return path


def _clear(path: Path) -> None:
    leftover = re.fullmatch(rf"\.(checkpoint-\d+|{BASE_FOLDER})\.(partial|replaced|deleted)", path.name)
    if leftover and path.exists():
        clear_leftovers(path.with_name(leftover[1]))
    if path.exists() and (leftover or path.name == MODEL_PARTIAL):
        logger.warning("removing %s, left by a process that was killed", path)
        shutil.rmtree(path)
    if path.name in _RESULTS and path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("removing %s, which was not written to its end", path)
            path.unlink()
