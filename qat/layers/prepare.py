"""prepare_qat: decide which layers of a model are trained under which scheme, replace them, and print what was done."""

from __future__ import annotations

import os
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
from .sites import KINDS, LINEAR, Site, find_sites, quantized_sites

# Names of the last layer: lists of layers to ignore have them whatever the model at hand calls its own.
_HEADS = {*DEFAULT_IGNORE, "embed_out"}
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
) -> nn.Module:
    """Replace linear layers by QuantLinear, in place; quantize the key/value cache, if asked for.

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

    Returns:
        `model`, its quantization written into `model.qat_config`.

    Raises:
        UserError: an unknown scheme, rule or key, a key that matches no linear layer or ignored ones only, a pattern of
            `ignore` that matches nothing (names of heads may), a layer that the blocks of its scheme do not
            divide, scales that cannot be learned, an attention layer that does not expose its keys and values, or
            nothing left to quantize. The model is unchanged then.
    """
    if mapping is not None and not isinstance(mapping, Mapping):
        raise UserError(f"mapping={mapping!r} does not map layers to schemes, as {{torch.nn.Linear: 'MXFP4'}} does")
    by_name = {_normalize_key(key): scheme_name(name) for key, name in (mapping or DEFAULT_MAPPING).items()}
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    schemes = {name: get_scheme(name, weight_scale_rule, input_scale_rule) for name in dict.fromkeys(by_name.values())}
    for name, rules in (scale_rules or {}).items():
        if name in schemes:
            schemes[name] = schemes[name].with_rules(**rules)

    chosen, left_alone = _choose_sites(model, by_name, ignore)
    for site, scheme in chosen:
        KINDS[site.kind].check(site.owner, schemes[scheme], site.name)
    settings = [name for name, on in zip(SETTINGS, (learn_exponent, learn_scale), strict=True) if on]
    for scheme in dict.fromkeys(scheme for _, scheme in chosen):
        check_learnable(schemes[scheme].weight, settings)
    if settings:
        _check_untied(model, chosen, settings[0])
    if kv_cache_scheme is not None:
        kv_cache_scheme, kv_spec = get_kv_cache_scheme(kv_cache_scheme)
        quantize_cache(cache_layers(model), kv_spec)  # checks before it changes anything
    for site, scheme in chosen:
        if not KINDS[site.kind].is_quantized(site.owner):  # with the other parameters of its module
            KINDS[site.kind].convert(site.owner, schemes[scheme], site.name, bool(settings))

    config = QATConfig(
        mapping=by_name,
        ignore=ignore,
        scale_rules={name: scheme.rules for name, scheme in schemes.items()},
        training=dict.fromkeys(settings, True),
        kv_cache_scheme=kv_cache_scheme,
    )
    tie_fused(model)
    set_qat_config(model, config)
    _print_summary(config, chosen, left_alone, len(cache_quantizers(model)) // 2)
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

    A name such as "MXFP4" when all quantized layers agree, "mixed: MXFP4 x 12, MXFP8 x 4" when they do not, and None
    when nothing is quantized. Layers whose quantizers are both disabled count as unquantized; a layer with one of them
    disabled is named by the half that works ("MXFP4 weight only", "MXFP4 input only"). A quantized key/value cache is
    named last ("MXFP4, key/value cache fp8_tensor").
    """
    counts = Counter(filter(None, map(_site_format, quantized_sites(module))))
    mixed = "mixed: " + ", ".join(f"{name} x {count}" for name, count in sorted(counts.items()))
    layers = mixed if len(counts) > 1 else next(iter(counts), None)
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
    model: nn.Module, mapping: Mapping[str, str], ignore: tuple[str, ...]
) -> tuple[list[tuple[Site, str]], dict[str, str]]:
    """[(site, scheme name)] of what is to be quantized, {name: reason} of weight-bearing modules left alone."""
    if prepared := quantized_sites(model):
        raise UserError(f"{prepared[0].name} is already a QuantLinear; prepare_qat takes an unprepared model")
    sites = find_sites(model)
    left_alone = _unknown_modules(model, {site.name for site in sites})
    chosen: list[tuple[Site, str]] = []
    used_keys: set[str] = set()
    for site in sites:
        keys = [key for key in mapping if key == KINDS[site.kind].key or matches(site.name, key)]
        used_keys.update(keys)
        pattern = next((p for p in ignore if matches(site.name, p)), None)
        if pattern is not None:
            left_alone[site.name] = f"ignored by {pattern!r}"
        elif keys:
            chosen.append((site, mapping[keys[-1]]))
        else:
            left_alone[site.name] = "no mapping key matches"
    for key in mapping:
        if key not in used_keys:
            found = _examples(chosen, left_alone)
            raise UserError(f"mapping key {key!r} matches no torch.nn.Linear; the model has {found}")
    if not chosen:
        raise UserError(
            f"nothing to quantize: no torch.nn.Linear is left in {type(model).__name__} after ignore={list(ignore)}; "
            f"it has {_examples(chosen, left_alone)}"
        )
    _check_effects(mapping, ignore, chosen, left_alone)
    return chosen, left_alone


def _check_effects(
    mapping: Mapping[str, str], ignore: tuple[str, ...], chosen: list[tuple[Site, str]], left_alone: dict[str, str]
) -> None:
    """Raise a UserError for a pattern of `ignore` that matches nothing, and a key that matches ignored layers only."""
    names = [*(site.name for site, _ in chosen), *left_alone]
    for pattern in ignore:
        if pattern not in _HEADS and not any(matches(name, pattern) for name in names):
            raise UserError(
                f'the ignore pattern {pattern!r} (--ignore, or "ignore" in a mapping file) matches no layer; give '
                f"{PATTERN_HELP}; the model has {_examples(chosen, left_alone)}"
            )
    for key in mapping:
        if key not in {kind.key for kind in KINDS.values()} and not any(matches(s.name, key) for s, _ in chosen):
            raise UserError(f"mapping key {key!r} matches only layers that ignore={list(ignore)} leaves alone")


def _unknown_modules(model: nn.Module, sites: set[str]) -> dict[str, str]:
    """{name: reason} of modules with weight matrices that are not sites; not of containers, norms and embeddings."""
    found = {}
    for name, module in model.named_modules():
        has_matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
        if name not in sites and has_matrix and not isinstance(module, nn.Embedding):
            kind = "a subclass of torch.nn.Linear" if isinstance(module, nn.Linear) else "not a torch.nn.Linear"
            found[name] = f"{type(module).__name__} is {kind}"
    return found


def _examples(chosen: list[tuple[Site, str]], left_alone: dict[str, str]) -> str:
    names = [*(site.name for site, _ in chosen), *left_alone]
    return f"{len(names)} weight modules, e.g. {', '.join(names[:4])}" if names else "no weight modules"


def _print_summary(
    config: QATConfig, chosen: list[tuple[Site, str]], left_alone: dict[str, str], cached_layers: int
) -> None:
    replaced = Counter(scheme for _, scheme in chosen)
    lines = ["Quantization-aware training of " + ", ".join(f"{n} linear layers in {s}" for s, n in replaced.items())]
    for name, rules in config.scale_rules.items():
        lines.append(f"  scale rules of {name}: weights {rules['weight']}, inputs {rules['input'] or 'not quantized'}")
    if config.kv_cache_scheme is not None:
        lines.append(f"  key/value cache of {cached_layers} attention layers in {config.kv_cache_scheme}")
    reasons = Counter(left_alone.values())
    for reason, count in reasons.items():
        example = next(name for name, why in left_alone.items() if why == reason)
        lines.append(f"  left unquantized: {count} ({reason}), e.g. {example}")
    for name, value in config.training.items():
        lines.append(f"  {name}: {value}")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)
