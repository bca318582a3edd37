"""Log the effects of quantization during training: oscillating codes and saturated values.

A weight near the border between two grid values can be pushed across and back by every other step, and its code with it
(Nagel et al., arXiv:2203.11086). An oscillation is a change of the quantized value (of its element, where a scale is no
power of two) whose direction is opposite to that of the value's last change; its frequency is a running mean with
momentum 0.01, as in that paper, and a weight counts as oscillating while the frequency exceeds 0.005: for about 70
steps after an oscillation.

Not every weight is looked at. Of each group of layers (attention, mlp, experts, other) at most 8 weights, spread over
the depth of the model, and 16 rows of each (of fused experts, spread over all of them), joined into one matrix, so that
a step costs a few dozen small operations whatever the model's size. Inputs are looked at in steps that are logged, in
at most 4 layers of each group, 64 tokens of each. Under FSDP2 these are rows that the logging process holds. In formats
with a tensor scale, the joined rows have one of their own, not that of their layers, which needs all rows. A resumed
run starts its histories anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from qat.layers.operands import Operands
from qat.layers.sites import EXPERTS, Site
from qat.layers.transform import transformed_input, transformed_weight
from qat.numerics import ops
from qat.numerics.codes import decode
from qat.numerics.families import family_of
from qat.numerics.formats import E8M0, Quantized
from qat.schemes.spec import TensorSpec

from .layer_groups import evenly_spaced, grouped_sites, local_part, local_rows, some_rows, spread_rows

logger = logging.getLogger(__name__)

MOMENTUM, OSCILLATING = 0.01, 0.005
LAYERS_PER_GROUP, ROWS_PER_LAYER = 8, 16
INPUTS_PER_GROUP, TOKENS_PER_INPUT = 4, 64


@dataclass
class WeightSample:
    """Rows of weights that share scheme and width, and the history of their quantized values [n, K]."""

    sites: list[Site]
    spec: TensorSpec
    dtype: torch.dtype
    values: torch.Tensor | None = None
    direction: torch.Tensor | None = None  # of each value's last change: -1, 0 (none yet), 1
    frequency: torch.Tensor | None = None
    changed: torch.Tensor | float = 0.0  # fraction of values, summed over steps
    steps: int = 0

    def quantize(self) -> tuple[torch.Tensor, Quantized]:
        """The weights [n, K] as they are seen in `dtype`, transformed where they are rounded so, and quantized."""
        rounding = self.sites[0].module.weight_quantizer.rounding
        weights = torch.cat([some_rows(site, ROWS_PER_LAYER) for site in self.sites])
        each = [[_present(local_part(p, site.weight.ndim)) for p in site.module.weight_quantizer.learned]
                for site in self.sites]  # fmt: skip
        learned = [torch.cat([_some(part) for part in parts]) for parts in zip(*each, strict=True)]
        is_transformed = self.sites[0].module.weight_quantizer.is_transformed
        seen = transformed_weight(weights, self.dtype) if is_transformed else weights.to(self.dtype)
        return seen, rounding.quantize(weights, self.dtype, *learned)

    @torch.no_grad()
    def update(self) -> None:
        """Compare the values with those of the step before."""
        values = _levels(self.quantize()[1], self.spec, self.dtype)
        if self.values is None:
            self.direction = torch.zeros_like(values, dtype=torch.int8)
            self.frequency = torch.zeros_like(values, dtype=torch.float32)
        else:
            change = (values - self.values).sign().to(torch.int8)
            oscillated = (change * self.direction) < 0
            self.frequency.lerp_(oscillated.float(), MOMENTUM)
            self.direction = torch.where(change == 0, self.direction, change)
            self.changed = self.changed + (change != 0).float().mean()
            self.steps += 1
        self.values = values

    @torch.no_grad()
    def saturated(self) -> torch.Tensor:
        """Fraction of the weights beyond their block's largest element."""
        return _fraction_saturated(*self.quantize(), self.spec)


class QuantizationMonitor(TrainerCallback):
    """Gathers figures while a prepared model trains; `metrics` gives them to the trainer's log.

    Args:
        model: prepared by `prepare_qat`.
        dtype: that the forward pass computes in.
        watch_inputs: False where hooks on layers would not run, under torch.compile.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, watch_inputs: bool = True) -> None:
        self.dtype = dtype
        self.groups = grouped_sites(model)
        self.samples: dict[str, list[WeightSample]] = {}
        self.inputs = {group: _distinct_inputs(sites) if watch_inputs else [] for group, sites in self.groups.items()}
        self.input_fractions: dict[str, list[torch.Tensor]] = {}
        self.hooks: list = []
        self.device: torch.device | None = None  # of products in FP8
        self.lost_rows = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Choose the weights; only now are they where they will be while training."""
        modules = [site.module for sites in self.groups.values() for site in sites.values()]
        if any(getattr(module, "in_fp8", False) for module in modules):
            self.device = args.device
            self.lost_rows = int(ops.lost_rows(self.device))
        self.samples = {group: _samples(list(sites.values()), self.dtype) for group, sites in self.groups.items()}
        if not any(self.samples.values()):
            logger.warning(
                "oscillation and saturation of weights are not logged: this process holds no whole rows of them, as "
                "under FSDP1, and of Conv1D and of layers with adapters under FSDP2"
            )
        for sample in self._all_samples():
            sample.update()

    def on_step_begin(self, args, state, control, **kwargs):
        """In a step that is going to be logged, look at the inputs of some layers."""
        if (state.global_step + 1) % max(1, int(state.logging_steps)) == 0:
            for group, modules in self.inputs.items():
                self.hooks += [module.register_forward_pre_hook(self._watch(group)) for module in modules]

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The weights have changed."""
        for sample in self._all_samples():
            sample.update()

    def on_step_end(self, args, state, control, **kwargs):
        """Hooks are gone before anything else runs the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def metrics(self) -> dict[str, float]:
        """Fractions since the last call, as "KIND/GROUP".

        flips: of quantized weights that changed in a step; oscillation: of weights that oscillate; saturation_weights
        and saturation_inputs: of values beyond the largest element of their block. Where products are computed in FP8,
        fp8_lost_rows is the number of rows since the last call whose products were computed in BF16 all the same.
        """
        fractions: dict[str, torch.Tensor] = {}
        for group, samples in self.samples.items():
            sizes = [sample.values.numel() for sample in samples if sample.steps]
            if sizes:
                fractions[f"flips/{group}"] = _mean([s.changed / s.steps for s in samples], sizes)
                frequencies = [(s.frequency > OSCILLATING).float().mean() for s in samples]
                fractions[f"oscillation/{group}"] = _mean(frequencies, sizes)
                fractions[f"saturation_weights/{group}"] = _mean([s.saturated() for s in samples], sizes)
            for sample in samples:
                sample.changed, sample.steps = 0.0, 0
        for group, seen in self.input_fractions.items():
            fractions[f"saturation_inputs/{group}"] = torch.stack(seen).mean()
        self.input_fractions = {}
        return {name: round(fraction.item(), 6) for name, fraction in sorted(fractions.items())} | self._lost_rows()

    def _lost_rows(self) -> dict[str, float]:
        if self.device is None:
            return {}
        before, self.lost_rows = self.lost_rows, int(ops.lost_rows(self.device))
        return {"fp8_lost_rows": self.lost_rows - before}

    def _all_samples(self) -> list[WeightSample]:
        return [sample for samples in self.samples.values() for sample in samples]

    def _watch(self, group: str):
        def look(module: Operands, args: tuple) -> None:
            x = args[0].detach()
            if not module.input_quantizer.is_enabled or not x.numel():  # off: the student is its own teacher
                return
            spec, rows = module.input_quantizer.spec, spread_rows(x.reshape(-1, x.shape[-1]), TOKENS_PER_INPUT)
            rows = transformed_input(rows.to(self.dtype)) if module.weight_quantizer.is_transformed else rows
            divisor = module.input_divisor(x.device)  # before the first step it is on the CPU
            quantized = ops.quantize(rows, spec.format.name, spec.rule, self.dtype, divisor)
            self.input_fractions.setdefault(group, []).append(_fraction_saturated(rows.to(self.dtype), quantized, spec))

        return look


def _levels(quantized: Quantized, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    """What is compared from step to step: the values [n, K] where a scale is a power of two.

    Other scales follow every change of a block's maximum, and all values with them, so there it is the elements.
    """
    if spec.format.scale == E8M0:
        return ops.dequantize(quantized, spec.format.name, dtype)
    return decode(quantized.codes, spec.format.element)


def _fraction_saturated(x: torch.Tensor, quantized: Quantized, spec: TensorSpec) -> torch.Tensor:
    return family_of(spec.format).saturates(x, quantized, spec.format).float().mean()


def _samples(sites: list[Site], dtype: torch.dtype) -> list[WeightSample]:
    """Some weights of a group, in lots that can be joined into a matrix."""
    lots: dict[tuple, list[Site]] = {}
    present = {site.label: rows.shape[-1] for site in sites if (rows := local_rows(site)) is not None and rows.numel()}
    for site in evenly_spaced([site for site in sites if site.label in present], LAYERS_PER_GROUP):
        quantizer = site.module.weight_quantizer
        key = quantizer.spec, present[site.label], bool(quantizer.learned), quantizer.is_transformed
        lots.setdefault(key, []).append(site)
    return [WeightSample(lot, key[0], dtype) for key, lot in lots.items()]


def _distinct_inputs(sites: dict[str, Site]) -> list[nn.Module]:
    """What reads some inputs of a group, one of those that share a parent and a width, and so in most models their
    input; each product of experts has its own."""
    distinct: dict[tuple, nn.Module] = {}
    for label, site in sites.items():
        if site.scheme.input is not None:
            alone = site.kind == EXPERTS.name
            distinct[label if alone else label.rpartition(".")[0], site.shape[1]] = site.module
    return evenly_spaced(list(distinct.values()), INPUTS_PER_GROUP)


def _present(part: torch.Tensor | None) -> torch.Tensor:
    assert part is not None  # `_samples` takes no others
    return part


def _some(rows: torch.Tensor) -> torch.Tensor:
    return spread_rows(rows, ROWS_PER_LAYER)


def _mean(fractions: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """The mean of `fractions`, weighted by the sizes of their samples."""
    return sum(fraction * size for fraction, size in zip(fractions, sizes, strict=True)) / sum(sizes)
