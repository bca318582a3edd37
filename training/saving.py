"""SavingTrainer: writes finished models in the dtypes that they were stored in, and checkpoints with FP32 masters.

* `save_model` writes one complete Hugging Face checkpoint in the model's original dtype, from FP32 masters, under every
  backend; `config.json` states that dtype; `qat_config.json` lies beside it. With adapters the weights are merged.
* The checkpoints from which a run resumes keep the FP32 masters, or resuming would not be exact.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from qat import QATConfig
from qat.layers.calibration import set_calibrated_scales
from qat.layers.finish import finished_config, finished_weights

from .adapters.checkpoints import AdapterTrainer
from .backends.saved_dtypes import SavedDtypes
from .backends.sharding import full_state_dict, round_parameters


class SavingTrainer(AdapterTrainer):
    """An AdapterTrainer that knows in which dtypes a model is saved, and what lies beside its tensors.

    Attributes:
        saved_dtypes: in which the final model is saved.
    """

    saved_dtypes: SavedDtypes
    _keep_masters = False  # while a checkpoint is written

    @property
    def qat_config(self) -> QATConfig | None:
        """How the model is quantized; None for an unquantized one."""
        return getattr(self.accelerator.unwrap_model(self.model), "qat_config", None)

    @qat_config.setter
    def qat_config(self, config: QATConfig) -> None:
        self.accelerator.unwrap_model(self.model).qat_config = config

    def round_masters(self) -> None:
        """Round FP32 masters to the dtype they are saved in, so that what is evaluated is what `save_model` writes."""
        round_parameters(self.model, self.saved_dtypes.by_name)

    # ---- Saving ----

    def _weights_were_loaded(self, checkpoint: Path) -> None:
        saved, model = QATConfig.load(checkpoint), self.accelerator.unwrap_model(self.model)
        if saved is not None and saved.calibrated_scales:
            set_calibrated_scales(model, saved.calibrated_scales)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete checkpoint in the original dtype to `output_dir` (default: `args.output_dir`).

        Under FSDP the full state dict is gathered, whatever type the intermediate checkpoints have; that type is in
        force again afterwards, also when saving fails.
        """
        if not self._keep_masters:
            whole = full_state_dict(self.accelerator.state.fsdp_plugin) if self.is_fsdp_enabled else nullcontext()
            with whole, self.adapters_gathered():
                super().save_model(output_dir, _internal_call)
            return
        super().save_model(output_dir, _internal_call)
        if (self.is_fsdp_enabled or self.has_adapters) and self.args.should_save:
            self._describe(output_dir or self.args.output_dir)

    def _describe(self, output_dir: str) -> None:
        """What is not a tensor: under SHARDED_STATE_DICT, and with adapters, a checkpoint's folder has nothing else."""
        model = self.accelerator.unwrap_model(self.model)
        model.config.save_pretrained(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        if (qat_config := self.qat_config) is not None:
            qat_config.save(output_dir)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self._keep_masters = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._keep_masters = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        if not self._keep_masters:
            state_dict = self.finished_state(model.state_dict() if state_dict is None else state_dict)
            state_dict = finished_weights(model, state_dict, self.saved_dtypes.by_name)
            state_dict = self.saved_dtypes.cast(model, state_dict)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if not self._keep_masters:
            self.saved_dtypes.write(Path(output_dir))
            if self.has_adapters:
                self._save_adapter(output_dir)
        if (qat_config := self.qat_config) is not None:
            (qat_config if self._keep_masters else finished_config(qat_config)).save(output_dir)
