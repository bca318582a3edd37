"""Imported once by the fork server: all that a run imports or caches some time, so that none has to wait for it.

Every run computes on one thread, so that sums have one order on every machine.
"""

import gc

import accelerate.utils.modeling  # noqa: F401
import tensorboard  # noqa: F401
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import main  # noqa: F401

with torch.device("meta"):  # nothing is computed: threads would not survive a fork
    LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
get_checkpoint_conversion_mapping("llama")
torch.set_num_threads(1)
gc.freeze()
