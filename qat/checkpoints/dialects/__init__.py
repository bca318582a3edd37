"""The formats in which engines read packed checkpoints, one class each.

A dialect is a `quantization_config` in config.json and the names of the tensors that go with it. Which of the schemes
it can hold, and under which scale rule its engine quantizes activations, is the dialect's to know; the bytes of codes
and scales are those of `numerics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from ...errors import UserError
from ...layers.sites import LINEAR, Site
from ...schemes.spec import Scheme, TensorSpec
from .auto_round import AutoRound
from .compressed_tensors import CompressedTensors


class Dialect(Protocol):
    """An export format.

    Attributes:
        name: as the command line has it.
        quant_method: as config.json has it.
    """

    name: str
    quant_method: str

    def can_hold(self, scheme: Scheme, kind: str = LINEAR.name) -> str | None:
        """Why the dialect cannot hold a scheme of a kind of sites, and the remedy; None if it can."""

    def config(self, sites: Mapping[str, Scheme], rest: list[str], kv_cache: TensorSpec | None = None) -> dict:
        """The `quantization_config` for what is packed (schemes by target) and what is left alone.

        Args:
            sites: see `targets.target_schemes`.
            rest: see `targets.left_alone`.
            kv_cache: how keys and values are quantized; None: not at all.

        Raises:
            UserError: the dialect cannot hold that.
        """

    def tensor_names(self, site: str, spec: TensorSpec) -> tuple[str, ...]:
        """The names of a site's tensors in the file: codes, then scales."""

    def input_rule(self, scheme: Scheme) -> str | None:
        """The scale rule that transformers applies to inputs when it loads the checkpoint; None: not quantized."""

    def logits_differ(self, scheme: Scheme) -> str | None:
        """Why the logits of transformers are not bit-equal to those of the scheme, under no rule; None if they are."""

    def serve_options(self, schemes: Iterable[Scheme]) -> list[str]:
        """What `vllm serve` must be told beside the folder, because the file cannot hold it; mostly nothing."""

    def decompress(self, tensors: list[torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """A weight [N, K] in BF16 from the tensors of its site, by the library that the dialect is named after."""


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (CompressedTensors(), AutoRound())}
EXPORT_FORMATS = tuple(DIALECTS)


def get_dialect(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in DIALECTS:
        raise UserError(f"export format {name!r} is unknown; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def dialect_of(quantization_config: dict | None, where: object) -> Dialect:
    """The dialect of a checkpoint's `quantization_config`.

    Raises:
        UserError: it is not a dialect of ours; the message names `where`.
    """
    method = (quantization_config or {}).get("quant_method")
    found = next((dialect for dialect in DIALECTS.values() if dialect.quant_method == method), None)
    if found is None:
        known = [dialect.quant_method for dialect in DIALECTS.values()]
        raise UserError(f"{where} is not a packed checkpoint: its quant_method is {method!r}, not one of {known}")
    return found


def check_schemes(dialect: Dialect, sites: Iterable[Site]) -> None:
    """Raise a UserError that names the first site which the dialect cannot hold."""
    for site in sites:
        if reason := dialect.can_hold(site.scheme, site.kind):
            raise UserError(f"{site.label} {reason}")
