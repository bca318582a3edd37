"""What surrounds a stage of main.py: getting ready, and packing what came out."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import set_seed

from qat.checkpoints.model_card import CardFacts
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.files.lock import LOCK_NAME

from ..arguments.data import DataArguments
from ..arguments.model import ModelArguments
from ..arguments.quantization import QuantizationArguments
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


def unused_folder(folder: str) -> str:
    """`folder` if it is free, else a new folder inside it: an evaluation overwrites nothing."""
    path, number = Path(folder), 0
    while path.exists() and any(child.name != LOCK_NAME for child in path.iterdir()):
        number += 1
        path = Path(folder, f"evaluation-{number}")
    return str(path)


def export(
    model: nn.Module,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    data_args: DataArguments,
    quant_args: QuantizationArguments,
) -> None:
    """Pack what was trained into a folder named after its scheme, and prove that it is the same model."""
    if quant_args.export_format == "none":
        return
    source = training_args.output_dir
    target = Path(source, "-".join(dict.fromkeys(model.qat_config.mapping.values())))
    facts = CardFacts(model_args.model_name_or_path, data_args.dataset)
    export_checkpoint(source, target, quant_args.export_format, overwrite=True, facts=facts)
    verify(target, source)
    logger.info("Serve it: vllm serve %s", target)
