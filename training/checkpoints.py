"""Which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from qat import QATConfig


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | None, qat_config: QATConfig | None) -> str | None:
    """The checkpoint to resume from: the one named, else the newest in `output_dir`, else None.

    Args:
        resume_from_checkpoint: a checkpoint folder; "True" for the newest in `output_dir` (an error if there is none),
            "False" for a fresh start.
        qat_config: of the model about to be trained; None in the BF16 stage.

    Raises:
        ValueError: no such checkpoint, or it belongs to another stage or scheme.
    """
    wanted = str(resume_from_checkpoint or "").lower()
    if wanted == "false":
        return None
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    checkpoint = newest if wanted in ("", "true") else resume_from_checkpoint
    if checkpoint is None:
        if wanted == "true":
            raise ValueError(f"--resume_from_checkpoint True: --output_dir {output_dir!r} holds no checkpoint")
        return None
    if not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint!r} is no checkpoint (it has no trainer_state.json); "
            "name a checkpoint-N folder, or leave the argument away to take the newest in --output_dir"
        )
    _check_same_training(checkpoint, QATConfig.load(checkpoint), qat_config)
    return checkpoint


def _check_same_training(checkpoint: str, saved: QATConfig | None, current: QATConfig | None) -> None:
    if (saved is None) == (current is None) and (saved is None or saved.same_training(current)):
        return
    raise ValueError(
        f"cannot resume from {checkpoint}: it was written by {_describe(saved)}, this run is {_describe(current)}. "
        "Use the same --quant_scheme, or another --output_dir, or --resume_from_checkpoint False to start anew"
    )


def _describe(config: QATConfig | None) -> str:
    return f"a QAT run ({config.summary}, ignoring {list(config.ignore)})" if config else "a run without quantization"
