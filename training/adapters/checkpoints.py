"""AdapterTrainer: a FaultTolerantTrainer whose checkpoints hold the adapters alone, where a model has some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers.trainer import SCHEDULER_NAME

from qat.errors import UserError
from qat.files.model_folder import ADAPTER_FOLDER, ADAPTER_NAME
from qat.layers.names import original_name
from qat.layers.packed_base import is_own, packed_sites

from ..arguments.lora import BASE_UNDER_FSDP
from ..backends.sharding import reshard
from ..resume.fault_tolerance import FaultTolerantTrainer
from .files import read_factors, write_adapter
from .inject import config_of
from .merging import factors_of, merged_weights


class AdapterTrainer(FaultTolerantTrainer):
    """A FaultTolerantTrainer for models with and without adapters.

    The frozen weights are those of the model that a run starts from, so a checkpoint has A and B in PEFT's files, in
    place of a model. A finished run saves the merged model, and the adapters in a folder inside.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and packed_sites(self._own_model):
            raise UserError(BASE_UNDER_FSDP)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained in place of weights."""
        return config_of(self._own_model) is not None

    @property
    def _own_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """FaultTolerantTrainer's own; in a checkpoint, the adapters in place of a model."""
        if self._content is None or not self.has_adapters:
            super().save_model(output_dir, _internal_call)
            return
        factors = factors_of(self._own_model)
        if self.args.should_save:
            write_adapter(output_dir or self.args.output_dir, self._own_model, factors, self._base_name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own, which under FSDP writes the whole model, too."""
        if not (self.has_adapters and self.is_fsdp_enabled):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        reshard(self.model)  # the optimizer knows shards, and the model may have whole parameters from an evaluation
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    @property
    def _base_name(self) -> str | None:
        """The model that the adapters belong to."""
        config = config_of(self._own_model)
        own = None if config is None else config.base_model_name_or_path
        return own or getattr(self._own_model.config, "_name_or_path", None) or None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        is_adapter = Path(resume_from_checkpoint, ADAPTER_NAME).is_file()
        if is_adapter != self.has_adapters:
            raise UserError(
                f"{resume_from_checkpoint} was written by a run with{'' if is_adapter else 'out'} adapters, and this "
                f"run has {'some' if self.has_adapters else 'none'}; give the same --lora_r, or another --output_dir, "
                "or --resume_from_checkpoint False to start anew"
            )
        if not is_adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._check_optimizer_files(Path(resume_from_checkpoint))
        load_factors(self._own_model, read_factors(resume_from_checkpoint, self._own_model))
        self._weights_were_loaded(Path(resume_from_checkpoint))

    def _check_optimizer_files(self, checkpoint: Path) -> None:
        """Refuse a state of the optimizer that this backend writes, and reads, in other files."""
        names = {"optimizer.pt": "without FSDP", "optimizer.bin": "under FSDP with FULL_STATE_DICT",
                 "optimizer_0": "under FSDP with SHARDED_STATE_DICT"}  # fmt: skip
        own = "optimizer.pt"
        if self.is_fsdp_enabled:
            is_full = "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            own = "optimizer.bin" if is_full else "optimizer_0"
        found = next((name for name in names if Path(checkpoint, name).exists()), own)
        if not Path(checkpoint, own).exists() and found != own:
            raise UserError(
                f"{checkpoint} was written {names[found]}, and this run trains {names[own]}, which keeps the state of "
                "the optimizer in other files; resume it with the accelerate configuration that it was started with"
            )

    def _load_best_model(self) -> None:
        if not self.has_adapters:
            super()._load_best_model()
            return
        if (best := self._complete_best()) is not None:
            load_factors(self._own_model, read_factors(best, self._own_model))
            self._weights_were_loaded(best)

    # ---- The finished model ----

    def finished_state(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of the model as it is saved: merged weights, no adapters."""
        if not self.has_adapters:
            return state_dict
        plain = {name: tensor for name, tensor in state_dict.items() if not is_own(name)}
        return plain | self._merged

    @contextmanager
    def adapters_gathered(self) -> Iterator[None]:
        """Merge, with all processes, what those that write save inside."""
        if not self.has_adapters:
            yield
            return
        self._factors = factors_of(self._own_model)
        self._merged = merged_weights(self._own_model, keep=self.args.should_save)
        try:
            yield
        finally:
            del self._factors, self._merged

    def _save_adapter(self, output_dir: str) -> None:
        write_adapter(Path(output_dir, ADAPTER_FOLDER), self._own_model, self._factors, self._base_name)


@torch.no_grad()
def load_factors(model: nn.Module, factors: dict[str, torch.Tensor]) -> None:
    """Copy A and B into a model's adapters, whole or sharded."""
    reshard(model)
    for name, parameter in model.named_parameters():
        if (value := factors.get(original_name(name))) is not None:
            _copy(parameter, value)


def _copy(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        parameter.copy_(distribute_tensor(value.to(parameter.device), mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(value)
