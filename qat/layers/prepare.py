"""prepare_qat: decide which layers of a model are trained under which scheme, replace them, and print what was done."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import UserError
from ..schemes.config import QATConfig
from ..schemes.mapping_file import DEFAULT_IGNORE
from ..schemes.patterns import HELP as PATTERN_HELP
from ..schemes.patterns import matches
from ..schemes.presets import get_kv_cache_scheme, get_scheme, scheme_name
from ..schemes.spec import Scheme
from .fused import tie_fused
from .kv_cache import cache_layers, cache_quantizers, quantize_cache
from .learned import SETTINGS, check_learnable
from .left_alone import GENERAL_KEYS, NO_KEY, UNFIT, Defaults, check_named_sites_fit, is_named, output_head
from .share import (
    ENOUGH,
    describe_left,
    describe_sites,
    has_matrix,
    linear_weights,
    not_a_site,
    percent,
    quantized_share,
)
from .sites import EXPERTS, KINDS, LINEAR, Site, find_sites, quantized_sites
from .transformed import Transformed, choose_transformed, describe_untransformed

# Names of the last layer: lists of layers to ignore have them whatever the model at hand calls its own.
_HEADS = {*DEFAULT_IGNORE, "embed_out"}
_SHOWN = 8  # names in a message
_LAYER = "layer that can be quantized"
DEFAULT_MAPPING: Mapping[type, str] = {nn.Linear: "MXFP8"}
# Scheme names by module type or glob. Three types, because a Mapping is invariant in its keys.
SchemeMapping = Mapping[type, str] | Mapping[str, str] | Mapping[type | str, str]


def prepare_qat(
    model: nn.Module,
    mapping: SchemeMapping | None = None,
    ignore: Iterable[str] = ("lm_head",),
    weight_scale_rule: str | None = None,
    input_scale_rule: str | None = None,
    learn_exponent: bool = False,
    scale_rules: Mapping[str, Mapping[str, str | None]] | None = None,
    learn_scale: bool = False,
    kv_cache_scheme: str | None = None,
    left_alone: Mapping[str, str] | None = None,
    input_transforms: Mapping[str, str] | str | None = None,
) -> nn.Module:
    """Replace linear layers by QuantLinear, in place; quantize the key/value cache, if asked for.

    Layers that the rules of left_alone.py cover stay as they are, unless a pattern of `mapping` names them.

    Args:
        model: any module; layers may live on the meta device.
        mapping: scheme names (`presets.SCHEMES`) by module type (`torch.nn.Linear`, or the string "torch.nn.Linear") or
            by a pattern over full module names (schemes/patterns.py). Later entries win:
            `{nn.Linear: "MXFP4", "*.down_proj": "MXFP8"}`. Default: every nn.Linear in MXFP8.
        ignore: patterns of layers to leave alone. A pattern matches a full name or any dotted end of it, so "lm_head"
            also covers "model.lm_head".
        weight_scale_rule: a scale rule (see `numerics.rules`) in place of the presets' own, for every scheme.
        input_scale_rule: the same for inputs, which cannot be searched; must be the rule of the engine that will serve.
        learn_exponent: train the block exponents of weights in MX formats along with them, see learned_exponents.py.
        scale_rules: the rules of single schemes, as `QATConfig.scale_rules` names them.
        learn_scale: train the block scales of weights in INT4 and NVFP4 along with them, see learned_scales.py. A
            mapping with both kinds of formats takes both settings.
        kv_cache_scheme: one of `presets.KV_CACHE_SCHEMES`, for keys and values of all attention layers; see
            kv_cache.py. Their scales need calibration.
        left_alone: layers to leave alone, {name: reason}, in place of those that the rules cover; {} for none.
        input_transforms: transforms (`presets.INPUT_TRANSFORMS`) of the inputs of layers, by pattern, such as
            {"*.down_proj": "hadamard"}; or "hadamard", for all layers that an engine serves so, see transformed.py.

    Returns:
        `model`, its quantization written into `model.qat_config`.

    Raises:
        UserError: an unknown scheme, rule or key, a key that matches no linear layer or ignored ones only, a pattern of
            `ignore` that matches nothing (names of heads may), layers that a pattern names and that the blocks of
            their scheme do not divide, scales that cannot be learned, an attention layer that does not expose its keys
            and values, or nothing left to quantize. The model is unchanged then.
    """
    if mapping is not None and not isinstance(mapping, Mapping):
        raise UserError(f"mapping={mapping!r} does not map layers to schemes, as {{torch.nn.Linear: 'MXFP4'}} does")
    by_name = {_normalize_key(key): scheme_name(name) for key, name in (mapping or DEFAULT_MAPPING).items()}
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    schemes = {name: get_scheme(name, weight_scale_rule, input_scale_rule) for name in dict.fromkeys(by_name.values())}
    for name, rules in (scale_rules or {}).items():
        if name in schemes:
            schemes[name] = schemes[name].with_rules(**rules)

    chosen, left, by_rule = _choose_sites(model, by_name, ignore, schemes, left_alone)
    check_named_sites_fit(chosen, schemes)
    settings = [name for name, on in zip(SETTINGS, (learn_exponent, learn_scale), strict=True) if on]
    for scheme in dict.fromkeys(scheme for _, scheme in chosen):
        check_learnable(schemes[scheme].weight, settings)
    if settings:
        _check_untied(model, chosen, settings[0])
    transformed = choose_transformed(input_transforms or {}, chosen, schemes, settings, output_head(model))
    if kv_cache_scheme is not None:
        kv_cache_scheme, kv_spec = get_kv_cache_scheme(kv_cache_scheme)
        quantize_cache(cache_layers(model), kv_spec)  # checks before it changes anything
    for site, scheme in chosen:
        if not KINDS[site.kind].is_quantized(site.owner):  # with the other parameters of its module
            KINDS[site.kind].convert(site.owner, schemes[scheme], site.name, bool(settings))
    for site in transformed.sites:
        site.module.weight_quantizer.is_transformed = True

    config = QATConfig(
        mapping=by_name,
        ignore=ignore,
        scale_rules={name: scheme.rules for name, scheme in schemes.items()},
        training=dict.fromkeys(settings, True),
        kv_cache_scheme=kv_cache_scheme,
        left_alone=by_rule,
        kinds=tuple(sorted({site.kind for site, _ in chosen})),
        input_transforms=transformed.patterns,
    )
    tie_fused(model)
    set_qat_config(model, config)
    _print_summary(model, config, left, transformed)
    return model


def set_qat_config(model: nn.Module, config: QATConfig) -> None:
    """Let `model.qat_config` be `config`."""
    model.qat_config = config  # type: ignore[assignment]  # nn.Module declares tensors and modules only


def replace_with_quant_linear(model: nn.Module, schemes: Mapping[str, Scheme] | Scheme) -> nn.Module:
    """Convert the named layers of `model` in place (all plain nn.Linear for a single scheme); returns `model`."""
    for site in find_sites(model):
        scheme = schemes if isinstance(schemes, Scheme) else schemes.get(site.name)
        if site.kind == LINEAR.name and scheme is not None:
            LINEAR.convert(site.module, scheme, site.name, False)
    return model


def get_quantization_format(module: nn.Module) -> str | None:
    """The scheme that `module` computes in, and of everything inside it.

    A name such as "MXFP4" when all quantized layers agree, "mixed: MXFP4 x 12, MXFP8 x 4" when they do not (the experts
    of a layer count once: "MXFP4A16 x 2 experts"), and None when nothing is quantized. Layers whose quantizers are both
    disabled count as unquantized; a layer with one of them disabled is named by the half that works ("MXFP4 weight
    only", "MXFP4 input only"). A quantized key/value cache is named last ("MXFP4, key/value cache fp8_tensor").
    """
    counts: Counter[tuple[str, str]] = Counter()
    for name, kind, _ in dict.fromkeys((_site_format(s), s.kind, s.name) for s in quantized_sites(module)):
        if name is not None:
            counts[name, " experts" if kind == EXPERTS.name else ""] += 1
    mixed = "mixed: " + ", ".join(f"{name} x {count}{kind}" for (name, kind), count in sorted(counts.items()))
    names = {name for name, _ in counts}
    layers = mixed if len(names) > 1 else next(iter(names), None)
    caches = {quantizer.spec.format.name for quantizer in cache_quantizers(module) if quantizer.is_enabled}
    return ", ".join(filter(None, (layers, *(f"key/value cache {name}" for name in sorted(caches))))) or None


def _site_format(site: Site) -> str | None:
    weight, inputs = site.module.weight_quantizer.is_enabled, site.module.input_quantizer.is_enabled
    if weight and (inputs or site.scheme.input is None):
        return site.scheme.name
    if weight or inputs:
        return f"{site.scheme.name} {'weight' if weight else 'input'} only"
    return None


def _check_untied(model: nn.Module, chosen: list[tuple[Site, str]], setting: str) -> None:
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for site, _ in chosen:
        if any(site.weight is weight for weight in embeddings):
            raise UserError(
                f"{site.name} shares its weight with the embedding, whose values a finished run cannot "
                f"replace ({setting}=True); add {site.name!r} to `ignore`, or use {setting}=False"
            )


def _normalize_key(key: type | str) -> str:
    if key is nn.Linear:
        return LINEAR.key
    if isinstance(key, str):
        return key
    raise UserError(f"mapping key {key!r} is neither torch.nn.Linear nor a pattern over names such as '*.down_proj'")


def _choose_sites(
    model: nn.Module,
    mapping: Mapping[str, str],
    ignore: tuple[str, ...],
    schemes: Mapping[str, Scheme],
    saved: Mapping[str, str] | None,
) -> tuple[list[tuple[Site, str]], dict[str, str], dict[str, str]]:
    """[(site, scheme name)] of what is to be quantized, {name: reason} of weight-bearing modules left alone, and those
    of them that a rule covers, or `saved`."""
    if prepared := quantized_sites(model):
        raise UserError(f"{prepared[0].name} is already a QuantLinear; prepare_qat takes an unprepared model")
    sites = find_sites(model)
    defaults = Defaults(model, ignore)
    left = _unknown_modules(model, {site.name for site in sites}, defaults)
    chosen: list[tuple[Site, str]] = []
    by_rule: dict[str, str] = {}
    used_keys: set[str] = set()
    for site in sites:
        keys = [key for key in mapping if key == KINDS[site.kind].key or matches(site.name, key)]
        used_keys.update(keys)
        pattern = next((p for p in ignore if matches(site.name, p)), None)
        if pattern is not None:
            left[site.name] = f"ignored by {pattern!r}"
        elif not keys:
            left[site.name] = NO_KEY
        elif saved is not None and site.name in saved:
            by_rule[site.name] = saved[site.name]
        elif (
            saved is None
            and not is_named(site.name, mapping)
            and (reason := defaults.reason_of_site(site, schemes[mapping[keys[-1]]]))
        ):
            by_rule[site.name] = reason
        else:
            chosen.append((site, mapping[keys[-1]]))
    chosen = [(site, scheme) for site, scheme in chosen if site.name not in by_rule]  # all of a module, or nothing
    left |= by_rule
    for key in mapping:
        if key not in used_keys:
            raise UserError(f"mapping key {key!r} matches no {_LAYER}; {_why_unmatched(model, key, chosen, left)}")
    if not chosen:
        raise UserError(_nothing(model, ignore, by_rule, _examples(chosen, left)))
    _check_effects(model, mapping, ignore, chosen, left)
    return chosen, left, by_rule


def _nothing(model: nn.Module, ignore: tuple[str, ...], by_rule: Mapping[str, str], found: str) -> str:
    """What to say of a model of which nothing is quantized."""
    default = ""
    if by_rule:
        name, reason = next(iter(by_rule.items()))
        remedy = "" if reason.startswith(UNFIT) else "; name it in a mapping"
        default = f", and {len(by_rule)} are left alone by default (e.g. {name}: {reason}{remedy})"
    return (
        f"nothing to quantize: no torch.nn.Linear is left in {type(model).__name__} after ignore={list(ignore)}"
        f"{default}; it has {found}"
    )


def _check_effects(
    model: nn.Module,
    mapping: Mapping[str, str],
    ignore: tuple[str, ...],
    chosen: list[tuple[Site, str]],
    left: dict[str, str],
) -> None:
    """Raise a UserError for a pattern of `ignore` that matches nothing, and a key that matches ignored layers only."""
    names = [*(site.name for site, _ in chosen), *left]
    for pattern in ignore:
        if pattern not in _HEADS and not any(matches(name, pattern) for name in names):
            raise UserError(
                f'the ignore pattern {pattern!r} (--ignore, or "ignore" in a mapping file) matches no layer; give '
                f"{PATTERN_HELP}; {_why_unmatched(model, pattern, chosen, left)}"
            )
    for key in mapping:
        if key not in GENERAL_KEYS and not any(matches(s.name, key) for s, _ in chosen):
            raise UserError(f"mapping key {key!r} matches only layers that ignore={list(ignore)} leaves alone")


def _unknown_modules(model: nn.Module, sites: set[str], defaults: Defaults) -> dict[str, str]:
    """{name: reason} of modules with weight matrices that are not sites; not of containers, norms and embeddings."""
    return {
        name: defaults.reason(name, module) or not_a_site(module)
        for name, module in model.named_modules()
        if name not in sites and has_matrix(module)
    }


def _why_unmatched(model: nn.Module, pattern: str, chosen: list[tuple[Site, str]], left: dict[str, str]) -> str:
    """What to say of a pattern that matches nothing: what cannot be quantized but matches, or what there is."""
    if found := next((name for name in left if matches(name, pattern)), None):
        return f"it matches {found}, which cannot be quantized: {not_a_site(model.get_submodule(found))}"
    experts = [site.name for site, _ in chosen if site.kind == EXPERTS.name]
    experts = [name for name in dict.fromkeys([*experts, *left]) if name.rpartition(".")[2] == "experts"]
    inside = (
        f"all experts of a layer have one scheme, and the name {experts[0]}; "
        if experts and "expert" in pattern
        else ""
    )
    return f"{inside}the model has {_examples(chosen, left)}"


def _examples(chosen: list[tuple[Site, str]], left: dict[str, str]) -> str:
    """How many modules with weights there are, and their names, with `*` in place of the numbers of layers."""
    names = list(dict.fromkeys([*(site.name for site, _ in chosen), *left]))
    if not names:
        return "no weight modules"
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    shown = ", ".join(kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")
    experts = next((site.name for site, _ in chosen if site.kind == EXPERTS.name), None)
    hint = "" if experts is None else f"; experts are named as a whole: {experts}"
    return f"{len(names)} weight modules: {shown}{hint}"


def _print_summary(model: nn.Module, config: QATConfig, left: Mapping[str, str], transformed: Transformed) -> None:
    """Print what was done, the share first; warn of a small one. In the first process of several only."""
    if os.environ.get("RANK", "0") != "0":
        return
    share = quantized_share(model)
    lines = [f"{percent(share)} of the linear weights are quantized: {describe_sites(quantized_sites(model))}"]
    if share < ENOUGH:
        counted = {name.rpartition(".")[0] for name in linear_weights(model)}
        reasons = describe_left(model, {name: reason for name, reason in left.items() if name in counted})
        most = f"; most of the rest: {reasons[0]}" if reasons else ""
        lines.append(f"  WARNING: that is less than {100 * ENOUGH:.0f} %{most}")
    for name, rules in config.scale_rules.items():
        lines.append(f"  scale rules of {name}: weights {rules['weight']}, inputs {rules['input'] or 'not quantized'}")
    if config.kv_cache_scheme is not None:
        cached_layers = len(cache_quantizers(model)) // 2
        lines.append(f"  key/value cache of {cached_layers} attention layers in {config.kv_cache_scheme}")
    if transformed.sites:
        names = ", ".join(dict.fromkeys(site.name.rpartition(".")[2] for site in transformed.sites))
        count = f"{len(transformed.sites)} of {len({site.name for site in quantized_sites(model)})}"
        rest = f"; left: {describe_untransformed(transformed.left)}" if transformed.left else ""
        lines.append(f"  inputs of {count} layers transformed by Hadamard blocks of 32: {names}{rest}")
    lines += [f"  left unquantized: {line}" for line in describe_left(model, left)]
    lines += [f"  {name}: {value}" for name, value in config.training.items()]
    print("\n".join(lines), flush=True)
