"""SavedDtypes: FP32 masters are saved in the dtypes that the model was stored in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from qat.checkpoints.folder import CONFIG_NAME


@dataclass
class SavedDtypes:
    """In which dtypes a model was stored, and is saved again.

    Attributes:
        main: that config.json names; None where it is not known, and tensors are saved as they are.
        by_name: of each floating-point tensor.
        use_cache: what config.json said of it, since training changes that in memory; None where it says nothing.
    """

    main: torch.dtype | None = None
    by_name: dict[str, torch.dtype] = field(default_factory=dict)
    use_cache: bool | None = None

    def cast(self, model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each tensor in its dtype; tied weights, gathered apart by FSDP, share memory again."""
        tied = getattr(model, "all_tied_weights_keys", {})
        state_dict = {name: state_dict.get(tied.get(name), tensor) for name, tensor in state_dict.items()}
        cast: dict[tuple, torch.Tensor] = {}
        result = {}
        for name, tensor in state_dict.items():
            dtype = self.by_name.get(name, tensor.dtype)
            key = (tensor.data_ptr(), tensor.shape, dtype)
            result[name] = cast.setdefault(key, tensor.to(dtype)) if tensor.data_ptr() else tensor.to(dtype)
        return result

    def write(self, folder: Path) -> None:
        """Let config.json name the main dtype and `use_cache`; save_pretrained wrote those of the training."""
        path = folder / CONFIG_NAME
        if self.main is None or not path.is_file():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(self.main).removeprefix("torch.")
        if self.use_cache is not None:
            config["use_cache"] = self.use_cache
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
