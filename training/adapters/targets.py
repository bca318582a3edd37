"""Which layers get an adapter: PEFT's rules for names, and what is refused of what they match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.layers.conv1d import is_conv1d
from qat.layers.experts import layout_of
from qat.layers.quant_linear import LinearProduct, is_linear
from qat.layers.share import linear_weights, percent

from ..arguments.lora import ALL_LINEAR

ARGUMENT, PARAMETERS_ARGUMENT = "--lora_target", "--lora_target_parameters"
_ENOUGH = 0.9  # of the linear weights; a smaller fraction is worth a warning


def can_have_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantized or not, that an adapter can be attached to."""
    return is_linear(module) or is_conv1d(module) or isinstance(module, LinearProduct)


def resolve_targets(model: PreTrainedModel, config: LoraConfig, argument: str = ARGUMENT) -> list[str]:
    """The names of the layers that `config` names, each checked.

    "all-linear" becomes their list in `config`: every linear layer but the output head.

    Raises:
        UserError: a name, an expression or a parameter's name matches nothing, or a layer that cannot have an adapter.
    """
    modules = dict(model.named_modules())
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head = model.get_output_embeddings()
        config.target_modules = _shortest(
            {n for n, m in modules.items() if can_have_adapter(m) and m is not head}, modules
        )
    _check_all_match(modules, config, argument)
    _check_parameters(modules, config, argument)
    found = [name for name in modules if name and config.target_modules and _matches(config, name)]
    uses = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    for name in found:
        _check_layer(name, modules[name], uses, argument)
    if not found and not config.target_parameters:
        raise UserError(f"{argument} {_shown(config)} matches no layer; {_choices(modules)}")
    return found


def _shortest(names: set[str], modules: Iterable[str]) -> set[str]:
    """The last parts of names, where they name no other module: "q_proj" for that of each layer."""
    last = {name.rpartition(".")[2] for name in names}
    return last if {name for name in modules if name.rpartition(".")[2] in last} == names else names


def _matches(config: LoraConfig, name: str) -> bool:
    result = check_target_module_exists(config, name)
    return bool(result) and not isinstance(result, _ExcludedModule)


def _check_all_match(modules: dict[str, nn.Module], config: LoraConfig, argument: str) -> None:
    """PEFT passes over a name that matches nothing, if others match."""
    targets = config.target_modules
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"{argument} {targets!r} is no regular expression: {error}") from error
        return
    for target in sorted(targets or ()):
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UserError(f"{argument} {target!r} matches no layer; {_choices(modules)}")


def _check_parameters(modules: dict[str, nn.Module], config: LoraConfig, argument: str) -> None:
    """PEFT passes over the name of a parameter that matches nothing; here only experts' have adapters."""
    where = PARAMETERS_ARGUMENT if argument == ARGUMENT else argument
    experts = [f"{n}.{p}" for n, m in modules.items() if (own := layout_of(m)) is not None for p in own.parameters]
    for target in sorted(config.target_parameters or ()):
        if not any(name == target or name.endswith(f".{target}") for name in experts):
            ends = sorted({".".join(name.split(".")[-3:]) for name in experts})
            remedy = f"those of this model are {', '.join(ends)}" if ends else "this model has none; leave it out"
            raise UserError(f"{where} {target!r} is no weight of experts in fused parameters; {remedy}")


def _check_layer(name: str, module: nn.Module, uses: Counter, argument: str) -> None:
    weight = getattr(module, "weight", None)
    if weight is not None and uses[id(weight)] > 1:
        raise UserError(
            f"{argument}: {name} shares its weight with another layer (tied embeddings), which a merged adapter would "
            "change too; name others"
        )
    if not can_have_adapter(module):
        raise UserError(
            f"{argument}: {name} is a {type(module).__name__}, and adapters are for linear layers (torch.nn.Linear, "
            "Conv1D); name others"
        )


def _choices(modules: dict[str, nn.Module]) -> str:
    names = Counter(name.rpartition(".")[2] for name, module in modules.items() if can_have_adapter(module))
    shown = ", ".join([name for name, _ in names.most_common(12) if not name.isdigit()])
    return f"linear layers of this model are called {shown}; {ALL_LINEAR} means all but the head"


def _shown(config: LoraConfig) -> str:
    targets = config.target_modules
    return repr(targets) if isinstance(targets, str) else " ".join(sorted(targets or ()))


def coverage(model: nn.Module, adapted: set[str]) -> tuple[float, str]:
    """Which fraction of a model's linear weights has adapters, and a warning where that is less than 90 %, else "".

    Args:
        adapted: names of the weights that have one.
    """
    weights = linear_weights(model)
    sizes: Counter[str] = Counter()
    for name, weight in weights.items():
        if name not in adapted:
            sizes[re.sub(r"\.\d+(?=\.|$)", ".*", name)] += weight.numel()
    total = sum(weight.numel() for weight in weights.values())
    share = 1 - sum(sizes.values()) / max(1, total)
    if share >= _ENOUGH or not total:
        return share, ""
    largest = ", ".join(f"{name} ({percent(size / total)})" for name, size in sizes.most_common(3))
    return share, f"adapters cover {percent(share)} of the linear weights only; without one are {largest}"
