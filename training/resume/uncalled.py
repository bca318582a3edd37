"""UncalledLayers: refuse quantized weights that the model multiplies by without calling their layers.

Some families pass `layer.weight` to a function of their own, as Mamba's fused kernels do on GPUs. Such a weight is
trained without rounding, and the export would round it. The first step of a training shows it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from qat.errors import UserError
from qat.layers.left_alone import as_patterns
from qat.layers.names import original_name
from qat.layers.sites import Site, quantized_sites

from .safeguards import largest_of_processes


class UncalledLayers(TrainerCallback):
    """Before the first step is applied, refuse weights that have a gradient though no process called their layers.

    Forward pre-hooks see the calls of that step; they are removed before anything else runs the model. A gradient of
    zeros is none: sharding gives one to each weight. torch.compile would compile the hooks into the model, so nothing
    is looked at there; under DeepSpeed parameters have no gradients of their own, and nothing is found.
    """

    def __init__(self) -> None:
        self._sites: list[Site] = []
        self._called: set[nn.Module] = set()
        self._trained: set[int] = set()
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """What is to be called."""
        self._end()  # a training that failed in its first step may have left hooks
        self._sites = [] if args.torch_compile else quantized_sites(model)
        if getattr(args, "optimizer_in_backward", False):  # which frees each gradient, after these hooks
            weights = {id(site.kept): site.kept for site in self._sites}
            self._hooks = [p.register_post_accumulate_grad_hook(self._see_gradient) for p in weights.values()]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Watch the calls of the first step."""
        self._hooks += [site.module.register_forward_pre_hook(self._see) for site in self._sites]

    def _see(self, module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():  # else it is a teacher's pass, or the first of two under reentrant checkpointing
            self._called.add(module)

    def _see_gradient(self, weight: torch.Tensor) -> None:
        if _has_gradient(weight):
            self._trained.add(id(weight))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Raise UserError on all processes where a weight has a gradient and no process called its layer."""
        sites, called, freed = self._sites, self._called, self._trained
        self._end()
        if not sites:
            return
        weights = [site.kept for site in sites]  # tied ones are called by any of their names
        ids = {id(weight) for site, weight in zip(sites, weights, strict=True) if site.module in called}
        seen = largest_of_processes([id(weight) in ids for weight in weights], args)
        unseen = [site for site, is_seen in zip(sites, seen, strict=True) if not is_seen]
        if unseen:
            found = [id(site.kept) in freed or _has_gradient(site.kept) for site in unseen]
            trained = largest_of_processes(found, args)
            _check(sites, [site for site, is_trained in zip(unseen, trained, strict=True) if is_trained])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """A training without a step leaves no hooks behind."""
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._sites, self._called, self._trained, self._hooks = [], set(), set(), []


def _has_gradient(weight: torch.Tensor) -> bool:
    """Whether this process holds a part of the weight whose gradient is not zero; NaN is not."""
    gradient = weight.grad
    if gradient is None:
        return False
    return bool((gradient.to_local() if hasattr(gradient, "to_local") else gradient).any())


def _check(sites: list[Site], bad: list[Site]) -> None:
    if not bad:
        return
    names = list(dict.fromkeys(original_name(site.name) for site in bad))
    others = {original_name(site.name) for site in sites} - set(names)
    patterns = " ".join(map(repr, as_patterns(names, others)))
    which, weights = (names[0], "weight") if len(names) == 1 else (f"{names[0]} and {len(names) - 1} more", "weights")
    raise UserError(
        f"the model multiplies by the {weights} of {which} without calling {'it' if len(names) == 1 else 'them'}, so "
        "that training does not round what the export would round; nothing is saved. Leave what is so unquantized: "
        f'--ignore {patterns} (or "ignore" in a mapping file)'
    )
