"""What a run with adapters starts from: frozen weights and adapters, made anew or as they were when the run began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat import SCHEMES
from qat.errors import UserError
from qat.layers.lora import FACTORS, NAME, adapters
from qat.layers.names import original_name
from qat.layers.packed_base import pack_base
from qat.layers.sites import quantized_sites

from ..arguments.lora import LoraArguments
from ..backends.fingerprint import fingerprint
from ..backends.writers import Writers
from ..resume.output import OutputFolder
from ..resume.written import BASE_FOLDER
from ..start.start import Start
from .base import START_FOLDER, load_base, write_base
from .checkpoints import load_factors
from .files import check_factors, check_same_adapters, read_factors
from .inject import add_adapters, config_of, lora_config
from .published import find_adapter, read_config


class Adapters:
    """The adapters that a run is asked for, and where they come from.

    Args:
        arguments: of the command line; they ask for adapters.
        start: what the run starts from.

    Raises:
        UserError: the adapter that is named cannot be read.
    """

    def __init__(self, arguments: LoraArguments, start: Start) -> None:
        self.arguments, self.start = arguments, start
        name = arguments.adapter_name_or_path
        self.folder = None if name is None else find_adapter(name, start.cache_dir)
        self._argument = "--lora_target" if name is None else f"--adapter_name_or_path {name!r}"

    def config(self) -> LoraConfig:
        """PEFT's configuration.

        Raises:
            UserError: the adapter's asks for what cannot be done.
        """
        if self.folder is None:
            return lora_config(self.arguments)
        return read_config(self.folder, self.start.model_args.model_name_or_path)

    def add(self, model: PreTrainedModel, seed: int, decompose: bool = True) -> None:
        """Attach them to a model; see `add_adapters`.

        Args:
            decompose: whether --lora_init may change the weights of the model.
        """
        config = self.config()
        add_adapters(model, config if decompose else replace(config, init_lora_weights=True), seed, self._argument)

    def check(self, skeleton: PreTrainedModel) -> None:
        """Attach them to a model without weights, and refuse what does not fit.

        Raises:
            UserError: the model is packed, or has no scheme that its weights could be kept in; a layer cannot have an
                adapter; or an adapter that is read is of other layers or shapes.
        """
        is_packed = self.start.is_packed
        _check_unpacked(self.start.model_args.model_name_or_path, is_packed and not self.arguments.base_in_scheme)
        _check_has_scheme(self.arguments, skeleton, is_packed)
        self.add(skeleton, seed=0)
        if self.folder is not None:
            check_factors(self.folder, skeleton, self._argument)

    def begin(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        output: OutputFolder,
        checkpoint: str | None,
        change: Callable[[], None] | None,
        seed: int,
    ) -> str | None:
        """Attach them to the model of a run, with frozen weights and A and B as they were when the run began.

        All processes call this. Where frozen weights change, those in the folder "base" of `output` are the run's.

        Args:
            checkpoint: that the run resumes from.
            change: changes the weights of the model in place, such as smoothing does; None where nothing is asked for.

        Returns:
            A fingerprint of the model then; None in a process that has no weights.

        Raises:
            UserError: see `check`; or the checkpoint has other adapters, or its frozen weights are gone.
        """
        changes = self.arguments.changes_base or change is not None or self.arguments.base_in_scheme
        source = Path(checkpoint).resolve().parent / BASE_FOLDER if changes and checkpoint else None
        self._freeze(model, source, change)
        self.add(model, seed, decompose=source is None)
        if self.arguments.base_in_scheme:  # after PEFT, which knows no packed experts
            pack_base(model, exact=source is not None and change is not None)
        if source is not None and self.arguments.changes_base:
            _load(model, source / START_FOLDER)
        start = self.folder
        if changes:
            own = (output.path / BASE_FOLDER).resolve()
            self._keep(model, tokenizer, own, output.writers, is_new=source != own)
            start = own / START_FOLDER if self.arguments.changes_base else start
        if start is not None:
            _remember(model, _load(model, start))
        if checkpoint is not None:
            check_same_adapters(checkpoint, model)
        return fingerprint(model)

    def _freeze(self, model: PreTrainedModel, source: Path | None, change: Callable[[], None] | None) -> None:
        """Give a model its frozen weights: those in the folder `source` of the run that is resumed, or made anew."""
        packs = self.arguments.base_in_scheme
        has_weights = not any(parameter.is_meta for parameter in model.parameters())
        if source is not None and has_weights and (change is not None or not packs):  # else it is packed anew
            load_base(source, model, self.start.model_args.trust_remote_code)
        elif source is None and change is not None:
            change()

    def _keep(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, own: Path, writers: Writers, is_new: bool
    ) -> None:
        """Write frozen weights that no published model has to `own`, the folder that adapters name as their base."""
        config_of(model).base_model_name_or_path = str(own)
        if writers.leads and (is_new or not own.is_dir()):
            write_base(own, model, tokenizer, self.start.dtypes, self.arguments.changes_base)
        writers.wait()


def _load(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Copy the factors in a folder into a model's adapters, where this process has these; returns them in FP32."""
    factors = {name: tensor.float() for name, tensor in read_factors(folder, model).items()}
    if not any(parameter.is_meta for parameter in model.parameters()):
        load_factors(model, factors)
    return factors


def _remember(model: nn.Module, factors: dict[str, torch.Tensor]) -> None:
    """Let the adapters at the start be these: under FSDP a process may have no weights, and buffers are not sent."""
    for name, module in adapters(model).items():
        device = "cpu" if module.weight.is_meta else module.weight.device
        a, b = (factors[f"{original_name(name)}.{NAME}.{factor}"].to(device, copy=True) for factor in FACTORS)
        module.adapter.start_A, module.adapter.start_B = a, b


def _check_has_scheme(arguments: LoraArguments, skeleton: PreTrainedModel, is_packed: bool) -> None:
    """Refuse a packed base of a model without a scheme."""
    if arguments.base_in_scheme and not (quantized_sites(skeleton) or is_packed):
        raise UserError(
            "--base_in_scheme True needs a scheme to keep the weights in; give --quant_scheme (one of "
            f"{', '.join(SCHEMES)}) or --quant_mapping, or omit it"
        )


def _check_unpacked(name: str, is_packed: bool) -> None:
    """Refuse adapters of a packed model."""
    if is_packed:
        raise UserError(
            f"--model_name_or_path {name!r} is packed: its weights are quantized values, and adapters are merged into "
            "unquantized ones; give the unquantized model that it came from, or --base_in_scheme True to start from it"
        )
