"""main.py with FSDP switched on for processes without a GPU (gloo): accelerate itself enables FSDP on accelerators only.

    accelerate launch --config_file accelerate_config/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py [main.py's flags]

Everything but that switch is the product: the yaml's settings reach accelerate's plugin as they do on GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import accelerate.accelerator
import torch
import torch.distributed.fsdp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).parent.parent))

_init_state = AcceleratorState.__init__


def _init_state_with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    """What AcceleratorState does for MULTI_GPU, for MULTI_CPU."""
    _init_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.device = PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 takes cpu:0 for another one


class _PluginOnCPU(FullyShardedDataParallelPlugin):
    """The plugin looks for a GPU to put meta parameters on when module states are synchronized; here it is the CPU."""

    def __post_init__(self) -> None:
        names = "FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"
        wanted = [os.environ.get(name, "false") for name in names]
        os.environ.update(dict.fromkeys(names, "false"))
        super().__post_init__()
        os.environ.update(dict(zip(names, wanted, strict=True)))
        self.cpu_ram_efficient_loading = wanted[1].lower() == "true"
        if self.fsdp_version == 1:
            self.sync_module_states = "true" in (value.lower() for value in wanted)
            if self.sync_module_states:
                self.param_init_fn = lambda module: module.to_empty(device="cpu", recurse=False)


def enable() -> None:
    """Patch accelerate in this process."""
    AcceleratorState.__init__ = _init_state_with_fsdp
    accelerate.accelerator.FullyShardedDataParallelPlugin = _PluginOnCPU
    # FSDP1 insists on GPU tensors for the first broadcast; gloo broadcasts those of the CPU as well.
    torch.distributed.fsdp._init_utils._check_module_states_for_sync_module_states = lambda module_states: None


if __name__ == "__main__":
    enable()
    from main import main

    main()
