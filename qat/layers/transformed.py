"""Which layers of a model have transformed inputs: chosen by patterns, and refused where engines would not follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..errors import UserError
from ..numerics.hadamard import SIZE
from ..schemes.patterns import HELP, matches
from ..schemes.presets import check_transform
from ..schemes.spec import Scheme
from .fused import fused_groups
from .sites import LINEAR, Site, quantized_sites
from .transform import FORMATS


def transformed_sites(model: nn.Module) -> list[Site]:
    """The quantized layers of a model whose inputs are transformed."""
    return [site for site in quantized_sites(model) if is_transformed(site)]


def is_transformed(site: Site) -> bool:
    """Whether the inputs of a quantized site are transformed."""
    return site.module.weight_quantizer.is_transformed


def choose_transformed(
    transforms: Mapping[str, str],
    chosen: Sequence[tuple[Site, str]],
    schemes: Mapping[str, Scheme],
    learns: Iterable[str] = (),
) -> list[Site]:
    """Those of the sites to be quantized whose inputs `transforms`, {pattern: name}, names.

    Args:
        chosen: the sites, with the names of their schemes.
        schemes: by name.
        learns: settings by which layers train something beside their weights.

    Raises:
        UserError: a transform is unknown, a pattern matches none of the sites, or one that cannot be transformed; only
            some of the layers that engines fuse are named; or layers learn exponents or scales.
    """
    names = [site.name for site, _ in chosen]
    for pattern, name in transforms.items():
        check_transform(name, f"the input transform of {pattern!r}")
        if not any(matches(name, pattern) for name in names):
            raise UserError(
                f"the pattern {pattern!r} of input transforms matches no layer that is quantized, such as {names[0]}; "
                f"give {HELP}, or leave it out"
            )
    found = [(site, schemes[own]) for site, own in chosen if any(matches(site.name, key) for key in transforms)]
    if found and (setting := next(iter(learns), None)):
        raise UserError(f"{setting}=True and transformed inputs do not go together; leave one of them out")
    for site, scheme in found:
        _check(site, scheme)
    transformed = {site.name for site, _ in found}
    for group in fused_groups(names):
        if (rest := [name for name in group if name not in transformed]) and len(rest) < len(group):
            raise UserError(
                f"engines fuse {', '.join(group)}, which have one input, and {rest[0]} is not named by input "
                "transforms; name all of them, or none"
            )
    return [site for site, _ in found]


def _check(site: Site, scheme: Scheme) -> None:
    if site.kind != LINEAR.name:
        raise UserError(
            f"input transforms name {site.name}, of the kind {site.kind}; only linear layers can have them: give "
            "patterns that do not match it, such as '*.down_proj'"
        )
    if scheme.weight.format.name not in FORMATS:
        raise UserError(
            f"input transforms name {site.name}, which is in {scheme.name}: they are for blocks of {SIZE} values, and "
            f"its weights are in {scheme.weight.format.name}; give it a scheme with weights in {' or '.join(FORMATS)}, "
            "or leave it out"
        )
