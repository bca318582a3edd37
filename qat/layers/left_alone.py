"""What stays unquantized unless a mapping names it by a pattern: the head, routers, towers, layers that gain nothing.

Each rule has its reason: the summary, the model card and `verification.json` show it beside the layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import UserError
from ..schemes.mapping_file import DEFAULT_IGNORE
from ..schemes.patterns import matches
from ..schemes.spec import Scheme
from .sites import EXPERTS, KINDS, Site

GENERAL_KEYS = frozenset(kind.key for kind in KINDS.values())
FEWEST_OUTPUTS = 32  # of a layer worth quantizing: fewer are a few thousand weights, each of which decides much

HEAD = "the output head"
ROUTER = "a router or a gate"
DECAY = "decays and gates of linear attention"
UNCALLED = "the model multiplies by its weight without calling it"
NARROW = f"fewer than {FEWEST_OUTPUTS} outputs"
TOWER = "outside of the language model"
UNFIT = "in_features that the blocks of"  # and a scheme, do not divide
NO_KEY = "no mapping key matches"
ANOTHER_KIND = "a kind of layer that the training did not quantize"

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # parts of names; a router may have layers of its own
_DECAY = re.compile(r"(?:.*\.)?linear_attn\.in_proj_(?:a|b|ba)")
_UNCALLED = re.compile(r"(?:.*\.)?(?:mixer|mamba)\.dt_proj")  # of Mamba, Falcon-Mamba and Jamba


class Defaults:
    """The rules, applied to one model.

    Args:
        model: unprepared; its parameters may be on the meta device.
        ignore: patterns of layers to ignore; the head is left alone under whatever name if the default is among them.
    """

    def __init__(self, model: nn.Module, ignore: Collection[str]) -> None:
        self._head = output_head(model) if set(DEFAULT_IGNORE) & set(ignore) else None
        self._text = _language_model(model)

    def reason(self, name: str, module: nn.Module) -> str | None:
        """Why a module with weights is left alone, whether it can be quantized or not; None: no rule covers it."""
        if module is self._head:
            return HEAD
        if self._text is not None and id(module) not in self._text:
            return TOWER
        if _ROUTERS & set(name.split(".")):
            return ROUTER
        if _DECAY.fullmatch(name):
            return DECAY
        return UNCALLED if _UNCALLED.fullmatch(name) else None

    def reason_of_site(self, site: Site, scheme: Scheme) -> str | None:
        """The same for a site, which `scheme` may not fit."""
        if reason := self.reason(site.name, site.owner):
            return reason
        if site.kind != EXPERTS.name and site.shape[0] < FEWEST_OUTPUTS:
            return NARROW
        return None if fits(site, scheme) else f"{UNFIT} {scheme.name} do not divide"


def is_named(name: str, mapping: Iterable[str]) -> bool:
    """Whether a key of a mapping names a layer by a pattern, not as one of all layers."""
    return any(key not in GENERAL_KEYS and matches(name, key) for key in mapping)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits, whatever its name; None where the model does not tell."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def fits(site: Site, scheme: Scheme) -> bool:
    """Whether the blocks of a scheme's formats divide the reduction dimension of a site."""
    width = site.shape[1]
    return all(spec.format.fits(width) for spec in (scheme.weight, scheme.input) if spec is not None)


def check_named_sites_fit(chosen: Iterable[tuple[Site, str]], schemes: Mapping[str, Scheme]) -> None:
    """Refuse sites that a mapping asks for and that the blocks of their schemes do not divide.

    Raises:
        UserError: there are some; the message names all of them, as patterns for --ignore.
    """
    chosen = list(chosen)
    unfit = [(site, schemes[name]) for site, name in chosen if not fits(site, schemes[name])]
    if not unfit:
        return
    site, scheme = unfit[0]
    width = site.shape[1]
    spec = next(s for s in (scheme.weight, scheme.input) if s is not None and not s.format.fits(width))
    names = list(dict.fromkeys(site.name for site, _ in unfit))
    patterns = as_patterns(names, {site.name for site, _ in chosen} - set(names))
    others = f", and so it is with {len(names) - 1} more" if len(names) > 1 else ""
    what = f"sums over {width} values" if site.kind == EXPERTS.name else f"has in_features={width}"
    raise UserError(
        f"{site.label} {what}, which is not a multiple of the block size {spec.format.block} of "
        f"{spec.format.name}{others}; leave what is so unquantized: --ignore {' '.join(map(repr, patterns))} (or "
        '"ignore" in a mapping file)'
    )


def as_patterns(names: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """Few patterns that match `names` and none of `others`: numbers of layers become `*` where that is so."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    return [
        pattern
        for glob, group in groups.items()
        for pattern in (group if len(group) == 1 or any(matches(other, glob) for other in others) else [glob])
    ]


def _language_model(model: nn.Module) -> set[int] | None:
    """The ids of the modules of a multimodal model that compute with text; None where all do."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config(decoder=True) is config:
        return None
    find: Any = getattr(model, "get_decoder", None)
    decoder, head = find() if callable(find) else None, output_head(model)
    if decoder is None or decoder is model or decoder is head:
        return None
    parts = [decoder] if head is None else [decoder, head]
    return {id(module) for part in parts for module in part.modules()}
