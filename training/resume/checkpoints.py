"""Find the checkpoint that a run resumes from, and check that it may."""

from __future__ import annotations

import logging
from pathlib import Path

from qat import QATConfig
from qat.errors import UserError
from qat.files.manifest import MANIFEST_NAME, listed, problems
from qat.files.model_folder import ADAPTER_NAME, ADAPTER_WEIGHTS_NAME
from qat.files.trust import check_checkpoint
from qat.schemes.config import QAT_CONFIG_NAME

from ..backends.writers import Writers
from .run_record import RECORD_NAME
from .written import checkpoints_in, step_of

logger = logging.getLogger(__name__)

_LOOKED_AT = (QAT_CONFIG_NAME, ADAPTER_NAME, ADAPTER_WEIGHTS_NAME)  # before weights are read
_READ = (
    "trainer_state.json", RECORD_NAME, QAT_CONFIG_NAME, "model*.safetensors", "adapter_*", "optimizer*", "scheduler.pt",
    "rng_state*", "scaler.pt", "*/*.distcp", "*/.metadata",
)  # fmt: skip


def find_checkpoint(
    output_dir: str,
    resume_from_checkpoint: str | None,
    qat_config: QATConfig | None,
    writers: Writers | None = None,
    has_adapters: bool = False,
) -> str | None:
    """The checkpoint to resume from: the given one, else the newest complete one in `output_dir`, else None.

    All processes call this and get the same answer; each reads a part of the files.

    Args:
        resume_from_checkpoint: a checkpoint folder; "True" for the newest in `output_dir` (an error if there is none),
            "False" for a fresh start.
        qat_config: of the model about to be trained; None in the BF16 stage.
        has_adapters: whether adapters are trained in place of weights.

    Raises:
        UserError: no such checkpoint, none that is complete, or it belongs to another stage or scheme, or has weights
            in place of adapters or the reverse.
    """
    writers = writers or Writers()
    wanted = str(resume_from_checkpoint or "").lower()
    if wanted == "false":
        return None
    if wanted in ("", "true"):
        checkpoint = _newest_complete(output_dir, writers)
        if checkpoint is None and wanted == "true":
            raise UserError(_no_checkpoint(output_dir))
    else:
        checkpoint = resume_from_checkpoint
        _check_named(checkpoint, writers)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        _check_adapters(checkpoint, has_adapters)
        _check_same_training(checkpoint, QATConfig.load(checkpoint), qat_config)
    return checkpoint


def check_resumable(
    output_dir: str, resume_from_checkpoint: str | None, qat_config: QATConfig | None, has_adapters: bool = False
) -> str | None:
    """Refuse what `find_checkpoint` is going to refuse, as far as a look at small files shows it.

    Where the newest one is to be taken, and these files are damaged in it, nothing is said: `find_checkpoint` takes the
    one before.

    Returns:
        The checkpoint that was looked at, which may turn out not to be complete; None for a fresh start, and where none
        was looked at.

    Raises:
        UserError: no such checkpoint, or the newest one belongs to another stage or scheme, or has weights in place of
            adapters or the reverse.
    """
    wanted = str(resume_from_checkpoint or "").lower()
    found = [] if wanted == "false" else checkpoints_in(output_dir)
    if wanted == "true" and not found:
        raise UserError(_no_checkpoint(output_dir))
    if wanted not in ("", "true", "false"):
        _check_is_checkpoint(resume_from_checkpoint)
        found = [Path(resume_from_checkpoint)]
    if not found or (wanted in ("", "true") and _is_damaged(found[-1])):
        return None
    _check_adapters(str(found[-1]), has_adapters)
    _check_same_training(str(found[-1]), QATConfig.load(found[-1]), qat_config)
    return str(found[-1])


def _is_damaged(checkpoint: Path) -> bool:
    """Whether the small files are others than the manifest says; without one that is not known."""
    return (checkpoint / MANIFEST_NAME).is_file() and bool(problems(checkpoint, names=_LOOKED_AT))


def _check_adapters(checkpoint: str, has_adapters: bool) -> None:
    if Path(checkpoint, ADAPTER_NAME).is_file() == has_adapters:
        return
    saved, now, remedy = ("weights", "adapters", "leave out --lora_r or --adapter_name_or_path")
    if not has_adapters:
        saved, now, remedy = ("adapters", "weights", "give the same --lora_r or --adapter_name_or_path")
    raise UserError(
        f"cannot resume from {checkpoint}: it was written by a run that trained {saved}, and this one trains {now}; "
        f"{remedy}, or another --output_dir, or --resume_from_checkpoint False to start anew"
    )


def _no_checkpoint(output_dir: str) -> str:
    return f"--resume_from_checkpoint True: --output_dir {output_dir!r} holds no checkpoint"


def _newest_complete(output_dir: str, writers: Writers) -> str | None:
    """The newest checkpoint without a fault on any process; those skipped are logged."""
    steps = {step for part in writers.gather([step_of(p) for p in checkpoints_in(output_dir)]) for step in part}
    for step in sorted(steps, reverse=True):
        path = Path(output_dir, f"checkpoint-{step}")
        faults = _faults(path, writers)
        if not faults:
            return str(path)
        logger.warning("skipping %s: %s", path, "; ".join(faults))
    if steps:
        raise UserError(
            f"none of the {len(steps)} checkpoints in --output_dir {output_dir!r} is complete (checkpoint-{step}: "
            f"{'; '.join(faults)}). Give one that you trust (--resume_from_checkpoint PATH), or start anew "
            "(--resume_from_checkpoint False)"
        )
    return None


def _check_is_checkpoint(checkpoint: str) -> None:
    if not Path(checkpoint, "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint!r} is not a checkpoint (it has no trainer_state.json); "
            "give a checkpoint-N folder, or omit the argument to resume from the newest in --output_dir"
        )


def _check_named(checkpoint: str, writers: Writers) -> None:
    _check_is_checkpoint(checkpoint)
    if not Path(checkpoint, MANIFEST_NAME).is_file():
        logger.warning("%s has no %s: whether it is complete is not known", checkpoint, MANIFEST_NAME)
    elif faults := _faults(Path(checkpoint), writers):
        raise UserError(f"--resume_from_checkpoint {checkpoint!r} is not complete: {'; '.join(faults)}")


def _faults(path: Path, writers: Writers) -> list[str]:
    own = problems(path, writers.index, writers.count)
    if not own and (unlisted := _read_when_resuming(path) - listed(path)):
        own.append(f"its {MANIFEST_NAME} does not list {', '.join(sorted(unlisted))}")
    if not any(path.glob("optimizer*")):
        own.append("it has no state of the optimizer (--save_only_model?)")
    return list(dict.fromkeys(fault for part in writers.gather(own) for fault in part))


def _read_when_resuming(path: Path) -> set[str]:
    """The files of a checkpoint that decide how a run continues; others may lie there and are not looked at."""
    return {
        file.relative_to(path).as_posix() for pattern in _READ for file in path.glob(pattern) if file.is_file()
    }  # fmt: skip


def _check_same_training(checkpoint: str, saved: QATConfig | None, current: QATConfig | None) -> None:
    if (saved is None) == (current is None) and (saved is None or saved.same_training(current)):
        return
    raise UserError(
        f"cannot resume from {checkpoint}: it was written by {_describe(saved)}, this run is {_describe(current)}. "
        "Use the same --quant_scheme, or another --output_dir, or --resume_from_checkpoint False to start anew"
    )


def _describe(config: QATConfig | None) -> str:
    if config is None:
        return "a run without quantization"
    kinds = "" if config.kinds is None else f" of {' and '.join(config.kinds)}"
    left = f", {len(config.left_alone)} layers left alone by default" if config.left_alone else ""
    return f"a QAT run{kinds} ({config.summary}, ignoring {list(config.ignore)}{left})"
