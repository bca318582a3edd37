"""What transformers makes of a packed folder of this program: told from the folder, before anything is loaded."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from ..files.json_file import read_object
from ..layers.restore import prepare_as_saved
from ..layers.sites import EXPERTS, quantized_sites
from ..schemes.config import QATConfig
from .folder import CheckpointFolder
from .input_transforms import NOT_APPLIED, is_stored
from .layouts import packed_layers
from .loadable import runs_as_linear, why_not_loadable
from .packed_folder import skeleton_of
from .packed_sites import weights_of
from .stored_names import StoredNames
from .verdict import VERDICT_NAME


@dataclass(frozen=True)
class InTransformers:
    """How transformers loads a packed folder.

    Attributes:
        why_not: why it cannot, in one line; None where no reason is known.
        experts_as_linear: whether it makes linear layers of the experts, whose inputs it then quantizes.
    """

    why_not: str | None = None
    experts_as_linear: bool = False


def in_transformers(folder: str | Path, trust_remote_code: bool = False) -> InTransformers:
    """What is known of a packed folder; of one of another program, nothing.

    A verdict whose logits were compared settles that the folder can be loaded.

    Raises:
        UserError: it is no packed checkpoint, or its config.json is not that of a model.
    """
    checkpoint, own = CheckpointFolder.open(folder, "the packed folder"), QATConfig.load(folder)
    config = checkpoint.quantization_config or {}
    if own is None or not config:
        return InTransformers()
    if is_stored(config):
        return InTransformers(NOT_APPLIED)
    method = str(config.get("quant_method"))
    layers = packed_layers(checkpoint.stored, checkpoint.path, method)
    packed = {name for layer in layers.values() for name in layer.tensors.values()}
    model = skeleton_of(checkpoint, trust_remote_code)
    names = StoredNames(model, {*(set(checkpoint.stored) - packed), *weights_of(layers)})
    with contextlib.redirect_stdout(io.StringIO()):  # messages about training
        sites = quantized_sites(prepare_as_saved(model, own))
    as_linear = any(site.kind == EXPERTS.name and runs_as_linear(site.owner, method) for site in sites)
    verdict = checkpoint.path / VERDICT_NAME
    if verdict.is_file() and read_object(verdict).get("logits"):
        return InTransformers(None, as_linear)
    return InTransformers(why_not_loadable(model, names, config), as_linear)
