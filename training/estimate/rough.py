"""A rougher estimate, for models whose code does not run on fake tensors: from the sizes of their linear layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qat.layers.experts import layout_of
from qat.layers.sites import quantized_sites

from .dry_run import BACKWARD, FORWARD, LOSS, DryRun
from .fake_model import layers_of
from .live_bytes import Moment
from .plan import Plan

_RESIDUALS = 6  # FP32 tensors of the hidden size that a decoder layer keeps: its inputs, those of norms, norms' own
_LOGITS = 4  # tensors of a chunk's logits, in FP32
_CHUNK = 2048


def rough_run(student: PreTrainedModel, plan: Plan) -> DryRun:
    """What a step takes, from the inputs and outputs of matrix products. The model is not run."""
    tokens = plan.batch * plan.length
    config = student.config.get_text_config()
    hidden, layers = config.hidden_size, max(1, len(layers_of(student)))
    residuals = _RESIDUALS * 4 * hidden * tokens * layers
    products = tokens * sum(_bytes_of_a_token(module, config) for module in _products(student))
    kept = (residuals + products) if plan.trains else 0
    if plan.checkpoints and plan.trains:
        kept = kept // layers + 4 * hidden * tokens * layers
    gradients = 4 * sum(p.numel() for p in student.parameters()) if plan.trains and not plan.lora_r else 0
    largest = 4 * max(p.numel() for p in student.parameters())
    logits = _LOGITS * 4 * min(tokens, _CHUNK) * config.vocab_size
    head = 2 * 4 * hidden * config.vocab_size if plan.trains and not plan.lora_r else 0
    before = gradients if plan.accumulates else 0
    complete = 0 if plan.in_backward else gradients
    peaks = {FORWARD: Moment(kept + largest, before), LOSS: Moment(kept + logits + head, before)}
    if plan.trains:
        peaks[BACKWARD] = Moment(largest, complete)
    return DryRun(kept, peaks)


def _products(student: PreTrainedModel) -> list[nn.Module]:
    head = student.get_output_embeddings()
    return [m for m in student.modules() if m is not head and (isinstance(m, nn.Linear) or layout_of(m) is not None)]


def _bytes_of_a_token(module: nn.Module, config) -> float:
    """Of the input, kept as codes where it is quantized, and of the output in BF16."""
    bits = 16.0
    if (site := next(iter(quantized_sites(module)), None)) and site.scheme.input is not None:
        bits = site.scheme.input.format.bits_per_value(site.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features * bits / 8 + module.out_features * 2
    routes = getattr(config, "num_experts_per_tok", 1) or 1
    shapes = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
    return routes * sum(2.0 * (shape[-1] + shape[-2]) for shape in shapes)
