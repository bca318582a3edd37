"""prepare_qat: decide which layers of a model are trained under which scheme, replace them, and say what was done."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from ..schemes.config import QATConfig
from ..schemes.spec import LayerScheme, get_scheme
from .quant_linear import QuantLinear, check_convertible, convert, is_quantlinear

DEFAULT_SCHEME = "MXFP8"
_LINEAR_KEY = "torch.nn.Linear"


def prepare_qat(
    model: nn.Module,
    mapping: Mapping[type | str, str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    weight_scale_rule: str | None = None,
    input_scale_rule: str | None = None,
    learn_exponent: bool = False,
) -> nn.Module:
    """Replace linear layers by QuantLinear, in place.

    Args:
        model: any module; layers may live on the meta device.
        mapping: scheme names (`schemes.SCHEMES`) by module type (`torch.nn.Linear`, or the string "torch.nn.Linear") or
            by a glob over full module names. Later entries win: `{nn.Linear: "MXFP4", "*.down_proj": "MXFP8"}`.
            Default: every nn.Linear in MXFP8.
        ignore: globs of layers to leave alone. A pattern matches a full name or any dotted end of it, so "lm_head" also
            covers "model.lm_head".
        weight_scale_rule: "floor", "even", "rceil" or "search" in place of the presets' own, for every scheme.
        input_scale_rule: the same for inputs, which cannot be searched; must be the rule of the engine that will serve.
        learn_exponent: train the block exponents of weights along with them, see gradients.py.

    Returns:
        `model`, its quantization written into `model.qat_config`.

    Raises:
        ValueError: an unknown scheme or key, a key that matches no linear layer, a layer whose in_features are not a
            multiple of 32, or nothing left to quantize. The model is unchanged then.
    """
    mapping = {_normalize_key(key): scheme.upper() for key, scheme in (mapping or {nn.Linear: DEFAULT_SCHEME}).items()}
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    rules = weight_scale_rule, input_scale_rule
    schemes = {name: get_scheme(name, *rules) for name in dict.fromkeys(mapping.values())}

    chosen, left_alone = _choose_layers(model, mapping, ignore)
    for name, (module, _) in chosen.items():
        check_convertible(module, name)
    if learn_exponent:
        _check_untied(model, chosen)
    for name, (module, scheme) in chosen.items():
        convert(module, schemes[scheme], name, learn_exponent)

    model.qat_config = QATConfig(
        mapping=mapping,
        ignore=ignore,
        scale_rules={
            name: {"weight": scheme.weight.scale_rule, "input": scheme.input.scale_rule}
            for name, scheme in schemes.items()
        },
        training={"learn_exponent": True} if learn_exponent else {},
    )
    _print_summary(model.qat_config, chosen, left_alone)
    return model


def replace_with_quant_linear(model: nn.Module, schemes: Mapping[str, LayerScheme] | LayerScheme) -> nn.Module:
    """Convert the named layers of `model` in place (all plain nn.Linear for a single scheme); returns `model`."""
    if isinstance(schemes, LayerScheme):
        schemes = {name: schemes for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, scheme in schemes.items():
        convert(model.get_submodule(name), scheme, name)
    return model


def get_quantization_format(module: nn.Module) -> str | None:
    """The scheme that `module` computes in, and of everything inside it.

    A name such as "MXFP4" when all quantized layers agree, "mixed: MXFP4 x 12, MXFP8 x 4" when they do not, and None
    when nothing is quantized. Layers whose quantizers are both disabled count as unquantized; a layer with one of them
    disabled is named by the half that works ("MXFP4 weight only", "MXFP4 input only").
    """
    counts = Counter(filter(None, (_layer_format(m) for m in module.modules() if is_quantlinear(m))))
    if len(counts) > 1:
        return "mixed: " + ", ".join(f"{name} x {count}" for name, count in sorted(counts.items()))
    return next(iter(counts), None)


def _layer_format(layer: QuantLinear) -> str | None:
    weight, input_ = layer.weight_quantizer.is_enabled, layer.input_quantizer.is_enabled
    if weight and input_:
        return layer.scheme.name
    if weight or input_:
        return f"{layer.scheme.name} {'weight' if weight else 'input'} only"
    return None


def _check_untied(model: nn.Module, chosen: dict[str, tuple[nn.Linear, str]]) -> None:
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for name, (module, _) in chosen.items():
        if any(module.weight is weight for weight in embeddings):
            raise ValueError(
                f"{name} shares its weight with the embedding, for which no exponents can be learned; "
                f"add {name!r} to `ignore`, or use learn_exponent=False"
            )


def _normalize_key(key: type | str) -> str:
    if key is nn.Linear:
        return _LINEAR_KEY
    if isinstance(key, str):
        return key
    raise ValueError(f"mapping key {key!r} is neither torch.nn.Linear nor a glob over names such as '*.down_proj'")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _choose_layers(model, mapping, ignore):
    """{name: (module, scheme name)} of layers to replace, {name: reason} of weight-bearing modules left alone."""
    chosen: dict[str, tuple[nn.Linear, str]] = {}
    left_alone: dict[str, str] = {}
    used_keys: set[str] = set()
    for name, module in model.named_modules():
        if is_quantlinear(module):
            raise ValueError(f"{name} is already a QuantLinear; prepare_qat takes an unprepared model")
        if type(module) is not nn.Linear:
            if reason := _why_not_linear(module):
                left_alone[name] = reason
            continue
        keys = [key for key in mapping if key == _LINEAR_KEY or _matches(name, key)]
        used_keys.update(keys)
        pattern = next((p for p in ignore if _matches(name, p)), None)
        if pattern is not None:
            left_alone[name] = f"ignored by {pattern!r}"
        elif keys:
            chosen[name] = (module, mapping[keys[-1]])
        else:
            left_alone[name] = "no mapping key matches"
    for key in mapping:
        if key not in used_keys:
            found = _examples(chosen, left_alone)
            raise ValueError(f"mapping key {key!r} matches no torch.nn.Linear; the model has {found}")
    if not chosen:
        raise ValueError(
            f"nothing to quantize: no torch.nn.Linear is left in {type(model).__name__} after ignore={list(ignore)}; "
            f"it has {_examples(chosen, left_alone)}"
        )
    return chosen, left_alone


def _why_not_linear(module: nn.Module) -> str | None:
    """Why a module with weight matrices of its own is not replaced; None for containers, norms and embeddings."""
    if isinstance(module, nn.Embedding) or not any(p.ndim >= 2 for p in module.parameters(recurse=False)):
        return None
    kind = "a subclass of torch.nn.Linear" if isinstance(module, nn.Linear) else "no torch.nn.Linear"
    return f"{type(module).__name__} is {kind}"


def _examples(chosen, left_alone) -> str:
    names = [*chosen, *left_alone]
    return f"{len(names)} weight modules, e.g. {', '.join(names[:4])}" if names else "no weight modules"


def _print_summary(config: QATConfig, chosen, left_alone) -> None:
    replaced = Counter(scheme for _, scheme in chosen.values())
    lines = ["Quantization-aware training of " + ", ".join(f"{n} linear layers in {s}" for s, n in replaced.items())]
    for name, rules in config.scale_rules.items():
        lines.append(f"  scale rules of {name}: weights {rules['weight']}, inputs {rules['input']}")
    reasons = Counter(left_alone.values())
    for reason, count in reasons.items():
        example = next(name for name, why in left_alone.items() if why == reason)
        lines.append(f"  left unquantized: {count} ({reason}), e.g. {example}")
    for name, value in config.training.items():
        lines.append(f"  {name}: {value}")
    for pattern in config.ignore:
        if f"ignored by {pattern!r}" not in reasons:
            lines.append(f"  ignore pattern {pattern!r} matched no linear layer")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)
