"""The skeleton of a checkpoint: its model without weights, prepared as the training prepared it.

From it an exporter learns which tensors are packed under which scheme, without holding a single weight; transformers
builds it, so tensors that were renamed, tied or left out on purpose are told apart from missing ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..layers.learned_scales import check_baked
from ..layers.prepare import prepare_qat
from ..layers.quant_linear import is_quantlinear
from ..layers.restore import prepare_as_saved
from ..layers.sites import LINEAR, Site, quantized_sites
from ..schemes.config import QATConfig
from .folder import CONFIG_NAME, CheckpointFolder

logger = logging.getLogger(__name__)

# Engines fuse these into one matrix, so layers of one group must have one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def prepared_skeleton(
    checkpoint: CheckpointFolder,
    scheme: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    saved: QATConfig | None = None,
) -> tuple[PreTrainedModel, QATConfig]:
    """The model of `checkpoint` on the meta device, prepared for `scheme`, and its configuration.

    Args:
        scheme: a name or a mapping as in `prepare_qat`; None for what the checkpoint was trained with, whose own
            `ignore` then counts.
        saved: how the checkpoint was trained; default: its own `qat_config.json`.

    Raises:
        UserError: no scheme is known; a weight to be packed is missing, misnamed or shared with the embedding.
    """
    saved = saved or QATConfig.load(checkpoint.path)
    if scheme is None and saved is None:
        raise UserError(f"{checkpoint.path} has no qat_config.json, so it has no scheme; give --quant_scheme")
    check_baked(checkpoint.names, checkpoint.path)
    model = load_skeleton(checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):  # its messages are about training
        if scheme is None:
            assert saved is not None
            prepare_as_saved(model, saved)
        else:
            prepare_qat(model, {LINEAR.key: scheme} if isinstance(scheme, str) else scheme, ignore)
    config = cast(QATConfig, model.qat_config)
    if saved is not None and not saved.same_training(config):
        logger.warning("%s was trained with %s and is exported with %s", checkpoint.path, saved.summary, scheme)
    _check_layers(model, checkpoint)
    return model, config


def unquantized_layers(model: nn.Module, checkpoint: CheckpointFolder) -> list[str]:
    """Linear layers that stay unquantized: the model's own, and matrices (such as experts') under other names."""
    modules = dict(model.named_modules())
    own = [n for n, module in modules.items() if isinstance(module, nn.Linear) and not is_quantlinear(module)]
    stored = {name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight")}
    return own + sorted(stored - set(modules))


def load_skeleton(checkpoint: CheckpointFolder) -> PreTrainedModel:
    """The model that transformers makes of `checkpoint`, on the meta device.

    Raises:
        UserError: a parameter of the model is missing in the files, or has another shape there.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, device_map="meta", output_loading_info=True, local_files_only=True
        )
        model, report = loaded
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{checkpoint.path} does not fit the model of its {CONFIG_NAME}: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{checkpoint.path} lacks {len(missing)} tensors of {type(model).__name__}, e.g. {missing[0]}; "
            "copy or save the checkpoint again"
        )
    return model


def _check_layers(model: nn.Module, checkpoint: CheckpointFolder) -> None:
    sites, names = quantized_sites(model), checkpoint.names
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for site in sites:
        if any(site.weight is weight for weight in embeddings):
            raise UserError(
                f"{site.name} shares its weight with the embedding, which stays BF16; add {site.name!r} to `ignore`"
            )
        if site.tensor not in names:
            raise UserError(
                f"{checkpoint.path} has no tensor {site.tensor}, the weight of a quantized layer; load and save it "
                "with transformers, so that its tensors have the model's names"
            )
    layers = {site.name: site.scheme for site in sites}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for group in FUSED:
            fused = [layers.get(f"{parent}.{own}") for own in group if hasattr(model.get_submodule(parent), own)]
            if len({scheme and scheme.weight for scheme in fused}) > 1:
                logger.warning("%s: %s differ in scheme; vLLM fuses them and will refuse", parent, ", ".join(group))


def describe_sites(sites: Iterable[Site]) -> str:
    """For example "30 linear layers in MXFP4, 6 linear layers in MXFP8"."""
    counts = Counter(site.scheme.name for site in sites)
    return ", ".join(f"{count} linear layers in {name}" for name, count in counts.items())
