"""main.py with FSDP switched on for processes without a GPU (gloo); accelerate enables it on accelerators only.

    accelerate launch --config_file accelerate_config/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py [FLAG ...]

Everything but that switch is the product: the yaml's settings reach accelerate's plugin as they do on GPUs. What FSDP1
gets wrong on CPUs is fixed here, three lines of it, since nobody trains with it there.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import accelerate.accelerator
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle

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
    # FSDP1 refuses CPU tensors in its first broadcast, which gloo can do; and it takes a flat parameter that is on the
    # CPU for a copy of it, frees "the original", and reads freed memory.
    _init_utils._check_module_states_for_sync_module_states = lambda module_states: None
    FlatParamHandle.to_cpu = lambda handle: nullcontext()
    torch.Tensor.pin_memory = lambda tensor: tensor  # fsdp_offload_params; there is no GPU to pin memory for


if __name__ == "__main__":
    enable()
    import no_estimate

    from main import main

    no_estimate.leave_out()
    if all(
        word.endswith(".json") for word in sys.argv[1:]
    ):  # several runs, one after the other: importing takes longest
        for path in sys.argv[1:]:
            main([path])
    else:
        main()
