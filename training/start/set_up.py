"""Get ready for a stage: logging, seed, and what this machine's devices need."""

from __future__ import annotations

import logging
import sys

import torch
import transformers
from transformers import set_seed

from ..arguments.training import TrainingArguments
from ..backends.cpu_bfloat16 import is_needed, use_fast_bfloat16

logger = logging.getLogger(__name__)


def set_up(training_args: TrainingArguments) -> None:
    """Logging, seed, and what this machine's devices need."""
    _set_up_logging(training_args)
    set_seed(training_args.seed)
    if torch.cuda.device_count() > 1 and training_args.world_size == 1:
        logger.warning("One of %d GPUs is used; accelerate launch uses all", torch.cuda.device_count())
    if training_args.device.type == "cpu" and training_args.bf16 and is_needed():
        use_fast_bfloat16()
        logger.info("This CPU has no BF16 instructions: BF16 products are computed with its FP32 ones.")


def _set_up_logging(training_args: TrainingArguments) -> None:
    """Messages of the main process to standard error, progress bars and warnings of all."""
    level = logging.INFO if training_args.should_log else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    for name in ("main", "data", "training", "qat"):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity_warning()
