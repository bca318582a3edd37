"""Calibrate the scales that do not follow from weights with training samples: NVFP4's inputs, the key/value cache."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback

from data.supervised import make_supervised_data_module
from data.tokenizer import load_tokenizer
from qat import QATConfig, prepare_qat
from qat.checkpoints.load import load_plain
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs, calibrated_scales, needs_calibration, set_calibrated_scales

from ..arguments.quantization import QuantizationArguments
from ..backends.cpu_bfloat16 import is_needed, use_fast_bfloat16
from .samples import SAMPLES, TOKENS, computing_in_fp32, first_samples

if TYPE_CHECKING:
    from transformers import Trainer


def calibrate_with_data(
    model: nn.Module, data_module: dict, samples: int, device: torch.device, checkpoint: str | Path | None = None
) -> None:
    """Give a prepared model its calibrated scales: those of a checkpoint, else its own, else from training samples.

    All processes call this and get the scales of the first one, which under FSDP with `cpu_ram_efficient_loading` alone
    has weights.

    Args:
        model: prepared by `prepare_qat`; one that needs no calibrated scale is left as it is.
        data_module: from `make_supervised_data_module`.
        samples: how many training samples are read, at most; only the beginnings of long ones.
        device: where the model computes, see `samples.computing_in_fp32`.
        checkpoint: that the run resumes from.

    Raises:
        UserError: the checkpoint lacks a scale, or an input is 0 or not finite in all samples.
    """
    if checkpoint is not None and (saved := QATConfig.load(checkpoint)) is not None:
        if saved.calibrated_scales or needs_calibration(model):
            set_calibrated_scales(model, saved.calibrated_scales)
        return
    if not needs_calibration(model):
        return
    if not any(parameter.is_meta for parameter in model.parameters()):
        with computing_in_fp32(model, device, "calibration", "give a smaller --calibration_samples"):
            calibrate_inputs(model, first_samples(data_module, model.device, samples), _total(data_module, samples))
    if PartialState().num_processes > 1:
        _take_from_first_process(model)


def _take_from_first_process(model: nn.Module) -> None:
    """Give a model in all processes the calibrated scales that the first one has."""
    scales = [calibrated_scales(model)]
    broadcast_object_list(scales)
    set_calibrated_scales(model, scales[0])


def scales_of_checkpoint(
    folder: str | Path,
    scheme: str | Mapping[str, str],
    ignore: Iterable[str],
    dataset: str,
    samples: int = SAMPLES,
    trust_remote_code: bool = False,
    kv_cache_scheme: str | None = None,
) -> dict[str, float]:
    """The calibrated scales of an unquantized checkpoint for a scheme, as `export_checkpoint` takes them.

    Args:
        folder: a local folder.
        scheme: a name or a mapping, as in `prepare_qat`; so is `ignore`.
        dataset: whose first training samples are read, see `data.sources.readers.HELP`.
        samples: how many of them, at most; only their beginnings.
        trust_remote_code: run Python code that comes with the checkpoint.
        kv_cache_scheme: as in `prepare_qat`.

    Returns:
        Exact FP32 values by the names of tensors.

    Raises:
        UserError: the model, the data or the scheme cannot be used.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu" and is_needed():
        use_fast_bfloat16()
    tokenizer = load_tokenizer(str(folder), TOKENS, "SRC", trust_remote_code=trust_remote_code)
    data = make_supervised_data_module(dataset, tokenizer, eval_dataset="none", evaluate=False)
    model = load_plain(folder, "SRC", trust_remote_code=trust_remote_code).to(device)
    with contextlib.redirect_stdout(io.StringIO()):  # messages about training
        mapping = {torch.nn.Linear: scheme} if isinstance(scheme, str) else scheme
        prepare_qat(model, mapping, ignore, kv_cache_scheme=kv_cache_scheme)
    calibrate_inputs(model, first_samples(data, device, samples), _total(data, samples))
    return calibrated_scales(model)


def _total(data_module: dict, samples: int) -> int:
    """How many samples are going to be read, as far as it is known: a stream does not say how many it has."""
    dataset = data_module["train_dataset"]
    return min(samples, len(dataset)) if isinstance(dataset, Sized) else samples


class ScaleRefresh(TrainerCallback):
    """Calibrates again every so many optimizer steps, on the same samples, with the weights of that moment.

    Args:
        trainer: whose model is calibrated; all its processes read the same samples.
        data_module: from `make_supervised_data_module`.
        samples: how many training samples are read, at most.
        every: so many optimizer steps.
    """

    def __init__(self, trainer: Trainer, data_module: dict, samples: int, every: int) -> None:
        self.trainer, self.every = trainer, every
        self.batches = list(first_samples(data_module, torch.device("cpu"), samples))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Before a checkpoint of this step is written, which then has the new scales."""
        if state.global_step % self.every:
            return
        trainer = self.trainer
        batches = ({name: column.to(args.device) for name, column in batch.items()} for batch in self.batches)
        with trainer.compute_loss_context_manager():
            model = trainer.accelerator.unwrap_model(trainer.model)
            calibrate_inputs(model, batches, len(self.batches), forward=trainer.model_wrapped)
        if args.world_size > 1:
            _take_from_first_process(model)


def check_calibration(model: nn.Module, quant_args: QuantizationArguments) -> None:
    """Refuse settings of a calibration of scales that a prepared model does not have, or that it has already.

    Raises:
        UserError: as described.
    """
    every, samples = quant_args.input_scale_refresh, quant_args.calibration_samples
    is_calibrated, needs = bool(calibrated_scales(model)), needs_calibration(model)
    none = "no layer of the model has a calibrated scale, as inputs in NVFP4 and the key/value cache in FP8 have"
    if every and not (needs or is_calibrated):
        raise UserError(f"--input_scale_refresh {every} has no effect: {none}; leave it out")
    if samples != type(quant_args).calibration_samples and not (needs or every):
        reason = "the scales are those of the model, which are calibrated already" if is_calibrated else none
        raise UserError(f"--calibration_samples {samples} has no effect: {reason}; leave it out")
