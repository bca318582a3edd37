"""Which layers of a model have transformed inputs: named by patterns, or all that an engine serves so.

vLLM transforms the inputs of linear layers without a bias (`CompressedTensorsLinearTransformMethod`), in one way for
all layers that it fuses. It has no transforms for experts and for the output head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..errors import UserError
from ..numerics.hadamard import SIZE
from ..schemes.patterns import HELP, matches
from ..schemes.presets import check_transform
from ..schemes.spec import Scheme
from .fused import fused_groups
from .left_alone import HEAD, as_patterns
from .sites import EXPERTS, LINEAR, Site, quantized_sites
from .transform import FORMATS

AUTO = "auto"  # in place of patterns: all layers that an engine serves with transformed inputs
_NOT_SERVED = "which vLLM's transforms do not take"
_BIAS, _HEAD, _FUSED = f"with a bias, {_NOT_SERVED}", f"{HEAD}, {_NOT_SERVED}", "that engines fuse with one of these"


def transformed_sites(model: nn.Module) -> list[Site]:
    """The quantized layers of a model whose inputs are transformed."""
    return [site for site in quantized_sites(model) if is_transformed(site)]


def is_transformed(site: Site) -> bool:
    """Whether the inputs of a quantized site are transformed."""
    return site.module.weight_quantizer.is_transformed


@dataclass(frozen=True)
class Transformed:
    """What is transformed of the sites to be quantized.

    Attributes:
        sites: those whose inputs are transformed.
        patterns: {pattern: transform} that names them, as `QATConfig.input_transforms` keeps it.
        left: why the layers that no pattern was given for are not transformed, {name: reason}.
    """

    sites: list[Site]
    patterns: dict[str, str]
    left: dict[str, str] = field(default_factory=dict)


def choose_transformed(
    transforms: Mapping[str, str] | str,
    chosen: Sequence[tuple[Site, str]],
    schemes: Mapping[str, Scheme],
    learns: Iterable[str] = (),
    head: nn.Module | None = None,
) -> Transformed:
    """Those of the sites to be quantized whose inputs are transformed.

    Args:
        transforms: {pattern: name}; or a name alone, for all layers that an engine serves with transformed inputs.
        chosen: the sites, with the names of their schemes.
        schemes: by name.
        learns: settings by which layers train something beside their weights.
        head: the module that computes the logits.

    Raises:
        UserError: a transform is unknown, a pattern matches none of the sites, or one that cannot be transformed; only
            some of the layers that engines fuse are named; no site can be transformed; or layers learn exponents or
            scales.
    """
    found = _served(transforms, chosen, schemes, head) if isinstance(transforms, str) else _named(transforms, chosen)
    if found.sites and (setting := next(iter(learns), None)):
        raise UserError(f"{setting}=True and transformed inputs do not go together; leave one of them out")
    if not isinstance(transforms, str):
        _check_named(found.sites, chosen, schemes, head)
    return found


def describe_untransformed(left: Mapping[str, str]) -> str:
    """How many layers are left for each reason."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(left.values()).items())


def _served(
    transform: str, chosen: Sequence[tuple[Site, str]], schemes: Mapping[str, Scheme], head: nn.Module | None
) -> Transformed:
    """All sites that an engine serves with transformed inputs."""
    check_transform(transform, "the input transform")
    reasons = {site.name: _why_not(site, schemes[own], head) for site, own in chosen}
    left = {name: reason for name, reason in reasons.items() if reason}
    for group in fused_groups(reasons):
        if any(name in left for name in group):
            left |= {name: left.get(name, _FUSED) for name in group}
    if len(left) == len(reasons):
        raise UserError(
            f"--input_transform {transform} (input_transforms={transform!r}) transforms no input of this model, whose "
            f"quantized layers are {describe_untransformed(left)}; leave it out: --input_transform none"
        )
    sites = [site for site, _ in chosen if site.name not in left]
    return Transformed(sites, dict.fromkeys(as_patterns([site.name for site in sites], left), transform), left)


def _why_not(site: Site, scheme: Scheme, head: nn.Module | None) -> str | None:
    """Why no engine serves a site with transformed inputs; None: one does."""
    if site.kind != LINEAR.name or EXPERTS.name in site.name.split("."):
        return f"of the kind {EXPERTS.name if site.kind == LINEAR.name else site.kind}, {_NOT_SERVED}"
    if site.owner is head:
        return _HEAD
    if scheme.weight.format.name not in FORMATS:
        return f"with weights in {scheme.weight.format.name}, which transforms do not go with"
    return _BIAS if getattr(site.owner, "bias", None) is not None else None


def _named(transforms: Mapping[str, str], chosen: Sequence[tuple[Site, str]]) -> Transformed:
    """The sites that patterns match."""
    for pattern, name in transforms.items():
        check_transform(name, f"the input transform of {pattern!r}")
        if not any(matches(site.name, pattern) for site, _ in chosen):
            raise UserError(
                f"the pattern {pattern!r} of input transforms matches no layer that is quantized, such as "
                f"{chosen[0][0].name}; give {HELP}, or leave it out"
            )
    return Transformed([s for s, _ in chosen if any(matches(s.name, key) for key in transforms)], dict(transforms))


def _check_named(
    found: Iterable[Site],
    chosen: Sequence[tuple[Site, str]],
    schemes: Mapping[str, Scheme],
    head: nn.Module | None,
) -> None:
    """Raise a UserError for named sites that cannot be transformed, or without others that engines fuse with them."""
    scheme_of = {site.name: schemes[own] for site, own in chosen}
    transformed = {site.name for site in found}
    for site in found:
        _check(site, scheme_of[site.name], site.owner is head)
    for group in fused_groups(scheme_of):
        if (rest := [name for name in group if name not in transformed]) and len(rest) < len(group):
            raise UserError(
                f"engines fuse {', '.join(group)}, which have one input, and {rest[0]} is not named by input "
                "transforms; name all of them, or none"
            )


def _check(site: Site, scheme: Scheme, is_head: bool) -> None:
    if is_head:
        raise UserError(
            f"input transforms name {site.name}, {_HEAD}: give --input_transform_layers {AUTO}, which leaves it out, "
            "or patterns that do not match it"
        )
    if site.kind != LINEAR.name:
        raise UserError(
            f"input transforms name {site.name}, of the kind {site.kind}; only linear layers can have them: give "
            f"--input_transform_layers {AUTO}, which leaves it out, or patterns that do not match it"
        )
    if scheme.weight.format.name not in FORMATS:
        raise UserError(
            f"input transforms name {site.name}, which is in {scheme.name}: they are for blocks of {SIZE} values, and "
            f"its weights are in {scheme.weight.format.name}; give it a scheme with weights in {' or '.join(FORMATS)}, "
            "or leave it out"
        )
