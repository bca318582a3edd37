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
from ...numerics.formats import Quantized
from ...schemes.spec import Scheme, TensorSpec
from .auto_round import AutoRound
from .compressed_tensors import CompressedTensors
from .mxfp4 import FORMAT as NATIVE
from .mxfp4 import MODEL_TYPE, NativeMXFP4


class Dialect(Protocol):
    """An export format.

    Attributes:
        name: as the command line has it.
        quant_method: as config.json has it.
        packs_fused: whether a fused parameter of experts is packed as a whole, not expert by expert.
    """

    name: str
    quant_method: str
    packs_fused: bool

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

    def tensors(self, quantized: Quantized, spec: TensorSpec) -> list[torch.Tensor]:
        """The tensors of a matrix [N, K], or of a fused parameter [E, N, K], as the file has them."""

    def input_rule(self, scheme: Scheme) -> str | None:
        """The scale rule that transformers applies to inputs when it loads the checkpoint; None: not quantized."""

    def logits_differ(self, scheme: Scheme) -> str | None:
        """Why the logits of transformers are not bit-equal to those of the scheme, under no rule; None if they are."""

    def serve_options(self, schemes: Iterable[Scheme]) -> list[str]:
        """What `vllm serve` must be told beside the folder, because the file cannot hold it; mostly nothing."""

    def decompress(self, tensors: list[torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """A weight [N, K] in BF16 from the tensors of its site, by the library that the dialect is named after.

        That of a fused parameter is [E * N, K].
        """


AUTO = "auto"  # the native format of a model that has one, else compressed-tensors
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (CompressedTensors(), AutoRound(), NativeMXFP4())}
EXPORT_FORMATS = (AUTO, *DIALECTS)


def get_dialect(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in DIALECTS:
        raise UserError(f"export format {name!r} is unknown; choose one of {', '.join(EXPORT_FORMATS)}")
    return DIALECTS[name]


def resolved_format(name: str, model_type: str | None) -> str:
    """The name of a dialect for a model: `name`, or for "auto" the one that its engines know.

    Args:
        model_type: as config.json has it.

    Raises:
        UserError: the dialect is another model's.
    """
    if name == AUTO:
        return NATIVE if model_type == MODEL_TYPE else CompressedTensors.name
    if name == NATIVE and model_type != MODEL_TYPE:
        raise UserError(
            f"the export format {NATIVE} is the native one of {MODEL_TYPE}, and the model is a {model_type}; use "
            f"{CompressedTensors.name}"
        )
    return name


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
