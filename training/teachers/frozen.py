"""Who teaches: a frozen model, the student itself with its quantizers off, or a cache of what a teacher said.

A teacher's `rows(inputs)` says what it knows about the labelled tokens of a batch, as HiddenRows or SampledRows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from data.sets.cache import default_root
from qat.layers.quant_linear import is_quantlinear

from ..arguments.distillation import CacheSettings
from ..losses.chunked import Head, Rows, UnknownHead, find_head, head_with
from ..losses.distillation import HiddenRows, labelled_rows
from .cache import CachedTeacher, build_cache
from .sample_keys import weights_digest

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A model in memory that does not change: gradients off, on the device of the run, sharded under FSDP.

    Its body and its head are kept apart. The body is wrapped by FSDP like the student; the head is whole on every
    device (vocabulary x hidden x 2 bytes in BF16), because it is used while the student's forward runs, outside of the
    body's own.

    Args:
        model: the teacher, unwrapped; on FSDP's other processes its weights may be empty, they are sent from the first.
        device: where the run computes.
        accelerator: of the run; None keeps the teacher whole and this process by itself.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, accelerator: Accelerator | None = None) -> None:
        model.requires_grad_(False).eval()
        self.device = device
        self.head = agreed_head(model, accelerator)
        body = model if self.head is None else model.base_model
        if accelerator is None or accelerator.distributed_type != DistributedType.FSDP:
            model.to(device)
            self.body = body
            return
        if self.head is not None:
            module = copy.deepcopy(self.head.module)  # its weight may be tied to the body's
            empty = any(parameter.is_meta for parameter in module.parameters())
            module = module.to_empty(device=device) if empty else module.to(device)
            for parameter in module.parameters():
                parameter.data = broadcast(parameter.data)
            self.head = Head(module, self.head.transform, self.head.value)
        self.body = shard(body, accelerator)

    @torch.no_grad()
    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module | None = None) -> HiddenRows:
        """Hidden states of the labelled tokens of a batch (with `labels`)."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self.head is None:
            return HiddenRows(labelled_rows(self.body(**inputs).logits, labels))
        return HiddenRows(labelled_rows(self.body(**inputs).last_hidden_state, labels), self.head.logits)


class SelfTeacher:
    """The student itself with its quantizers off: no memory, one more forward.

    Its distributions change with the weights, so it is the unquantized model that the stage starts from in evaluations
    only. In training the student could lower the divergence by changing its teacher; that is refused.

    Raises:
        ValueError: the model has no quantized layer, or its head is not known.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None) -> None:
        self.layers = [module for module in model.modules() if is_quantlinear(module)]
        if not self.layers:
            raise ValueError(
                "--distill_teacher self: the model has no quantized layer, so it is its own teacher already; "
                "give --quant_scheme, or choose copy or cache"
            )
        if head is None:
            raise ValueError(
                f"--distill_teacher self needs a head of known form, {type(model).__name__}'s is not; choose copy"
            )
        self.model, self.head = model, head

    @torch.no_grad()
    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module) -> HiddenRows:
        """Hidden states of the labelled tokens of a batch (with `labels`), from the model as the Trainer calls it."""
        inputs = dict(inputs)
        objective = Rows(inputs.pop("labels"))
        was_training = student.training
        student.eval()
        try:
            with self.unquantized():
                hidden = student(**inputs, objective=objective)["rows"]
        finally:
            student.train(was_training)
        return HiddenRows(hidden, self._logits)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.unquantized():
            return self.head.logits(hidden)

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        """All quantizers that work are off inside."""
        quantizers = [q for layer in self.layers for q in (layer.weight_quantizer, layer.input_quantizer)]
        working = [quantizer for quantizer in quantizers if quantizer.is_enabled]
        for quantizer in working:
            quantizer.disable()
        try:
            yield
        finally:
            for quantizer in working:
                quantizer.enable()


def agreed_head(model: PreTrainedModel, accelerator: Accelerator | None) -> Head | None:
    """`find_head` on the first process, whose weights are loaded in every setting; None, and a warning, without one."""
    found: list[str | None] = ["", None]
    if accelerator is None or accelerator.is_main_process:
        try:
            found = [find_head(model).transform, None]
        except UnknownHead as error:
            found = ["", str(error)]
            logger.warning("%s: the logits of a whole batch will be held in memory", error)
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(found)
    return None if found[1] else head_with(model, found[0])


def shard(body: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen module by FSDP under the run's settings.

    `Accelerator.prepare_model(evaluation_mode=True)` wraps nothing, and refuses FSDP2 without an optimizer.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, body)
    return accelerator.prepare_model(body)


def make_cached_teacher(
    model: PreTrainedModel, training_args, data_module: dict, settings: CacheSettings, folder: str | None
):
    """The CachedTeacher of `model` for the sets of a data module, built by one process of each machine.

    The evaluation set is cached at temperature 1, at which its divergence is reported. `model` is not needed later.

    Args:
        folder: where caches are kept; None: beside those of the data.
    """
    root = Path(folder) if folder else default_root().with_name("teachers")
    builds = training_args.local_process_index == 0
    if builds and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "--distill_teacher cache is built by the first process of each machine, which has no weights here; set "
            "fsdp_cpu_ram_efficient_loading: false in the accelerate configuration, or choose --distill_teacher copy"
        )
    digest = [weights_digest(model) if builds else None]
    if training_args.world_size > 1:
        broadcast_object_list(digest)  # under FSDP the other processes have no weights to tell it from
    make_teacher = functools.cache(lambda: FrozenTeacher(model, training_args.device)) if builds else None
    folders = {}
    for which, temperature in (("train", settings.temperature), ("eval", 1.0)):
        dataset, own = data_module[f"{which}_dataset"], dataclasses.replace(settings, temperature=temperature)
        folders[which] = build_cache(root, make_teacher, digest[0], dataset, own, f"the {which} set")
    return CachedTeacher(folders)
