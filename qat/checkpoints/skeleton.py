"""The skeleton of a checkpoint: its model without weights, prepared as the training prepared it.

From it an exporter learns which tensors are packed under which scheme, without holding a single weight; transformers
builds it, so tensors that were renamed, tied or left out on purpose are told apart from missing ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..layers.calibration import set_calibrated_scales
from ..layers.fused import FUSED
from ..layers.learned import check_baked
from ..layers.prepare import prepare_qat
from ..layers.restore import prepare_as_saved
from ..layers.sites import LINEAR, quantized_sites
from ..schemes.config import QATConfig
from .fit import check_dtypes, load_checked
from .folder import CheckpointFolder
from .matrices import matrices_of
from .model_config import read_config
from .native_mxfp4 import loading_options
from .stored_names import StoredNames

logger = logging.getLogger(__name__)

UNTIED = (
    "tie_word_embeddings is true, and the head that is stored differs from the embedding; they are two tensors, and "
    "are saved as such, with tie_word_embeddings false"
)


def prepared_skeleton(
    checkpoint: CheckpointFolder,
    scheme: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    saved: QATConfig | None = None,
    trust_remote_code: bool = False,
    calibrated_scales: Mapping[str, float] | None = None,
    kv_cache_scheme: str | None = None,
) -> tuple[PreTrainedModel, QATConfig, StoredNames]:
    """The model of `checkpoint` on the meta device, prepared for `scheme`, its configuration, and its stored names.

    Args:
        scheme: a name or a mapping as in `prepare_qat`; None for what the checkpoint was trained with, whose own
            `ignore` then counts.
        saved: how the checkpoint was trained; default: its own `qat_config.json`.
        trust_remote_code: run Python code that comes with the checkpoint.
        kv_cache_scheme: as in `prepare_qat`, beside a `scheme`.
        calibrated_scales: as `QATConfig.calibrated_scales`; default: those of `saved`, if `scheme` is that of `saved`.

    Raises:
        UserError: no scheme is known; a weight to be packed is missing, misnamed or shared with the embedding; or a
            calibrated scale belongs to no layer.
    """
    saved = saved or QATConfig.load(checkpoint.path)
    if scheme is None and saved is None:
        raise UserError(f"{checkpoint.path} has no qat_config.json, so it has no scheme; give --quant_scheme")
    check_baked(checkpoint.names, checkpoint.path)
    model = load_skeleton(checkpoint, trust_remote_code)
    with contextlib.redirect_stdout(io.StringIO()):  # its messages are about training
        if scheme is None:
            assert saved is not None
            prepare_as_saved(model, saved)
        else:
            mapping = {LINEAR.key: scheme} if isinstance(scheme, str) else scheme
            prepare_qat(model, mapping, ignore, kv_cache_scheme=kv_cache_scheme)
    config = cast(QATConfig, model.qat_config)
    is_as_saved = saved is not None and saved.same_training(config)
    if calibrated_scales is None and is_as_saved:
        calibrated_scales = cast(QATConfig, saved).calibrated_scales
    if calibrated_scales:
        set_calibrated_scales(model, calibrated_scales)
        config = cast(QATConfig, model.qat_config)
    if saved is not None and not is_as_saved:
        logger.warning("%s was trained with %s and is exported with %s", checkpoint.path, saved.summary, scheme)
    names = StoredNames(model, checkpoint.names)
    _check_layers(model, names, checkpoint)
    return model, config, names


def load_skeleton(
    checkpoint: CheckpointFolder, trust_remote_code: bool = False, where: str | None = None
) -> PreTrainedModel:
    """The model that transformers makes of `checkpoint`, on the meta device.

    Args:
        trust_remote_code: run Python code that comes with it.
        where: what messages call it; default: its path.

    Raises:
        UserError: a parameter of the model is missing in the files, has another shape or integers there, or the files
            are those of another model.
    """
    where = where or str(checkpoint.path)
    config = read_config(checkpoint.path, where, trust_remote_code, local_files_only=True)
    model = load_checked(
        lambda: AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, device_map="meta", output_loading_info=True, local_files_only=True,
            use_safetensors=True, ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code,
            **loading_options(config),
        ),
        where,
    )  # fmt: skip
    check_dtypes(checkpoint.stored, model, where)
    _tie_as_stored(model, checkpoint)
    return model


def _tie_as_stored(model: PreTrainedModel, checkpoint: CheckpointFolder) -> None:
    """Tie weights that are stored twice as transformers does when it loads them: if their values are equal.

    On the meta device it cannot compare them, and leaves them apart.
    """
    names = checkpoint.names
    twice = [(a, b) for a, b in model.all_tied_weights_keys.items() if {a, b} <= names]
    for target, source in twice:
        a, b = checkpoint.read(target, source)
        if torch.equal(a, b.to(a.dtype)):
            module, _, parameter = target.rpartition(".")
            setattr(model.get_submodule(module), parameter, model.get_parameter(source))
    if twice:
        untie_if_different(model)


def untie_if_different(model: PreTrainedModel) -> bool:
    """Let the configuration say that head and embedding are two tensors where they are; returns whether it changed.

    Engines believe `tie_word_embeddings`: they would compute with the embedding and leave the head out.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    configs = [c for c in (model.config, model.config.get_text_config()) if getattr(c, "tie_word_embeddings", False)]
    if head is None or not configs or getattr(head, "weight", None) is embedding.weight:
        return False
    for config in configs:
        config.tie_word_embeddings = False
    return True


def check_untied(model: nn.Module) -> None:
    """Refuse a quantized layer that shares its weight with the embedding.

    Raises:
        UserError: there is one; the message names it.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for site in quantized_sites(model):
        if any(site.weight is weight for weight in embeddings):
            raise UserError(
                f"{site.name} shares its weight with the embedding, which stays BF16; add {site.name!r} to `ignore`"
            )


def _check_layers(model: nn.Module, names: StoredNames, checkpoint: CheckpointFolder) -> None:
    check_untied(model)
    matrices_of(names, quantized_sites(model), checkpoint.path)
    layers = {site.name: site.scheme for site in quantized_sites(model)}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for group in FUSED:
            fused = [layers.get(f"{parent}.{own}") for own in group if hasattr(model.get_submodule(parent), own)]
            formats = {scheme and (scheme.weight.format, scheme.input and scheme.input.format) for scheme in fused}
            if len(formats) > 1:
                logger.warning("%s: %s differ in scheme; vLLM fuses them and will refuse", parent, ", ".join(group))
