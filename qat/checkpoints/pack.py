"""Pack a checkpoint in BF16 into codes and scales that inference engines load as they are.

The codes and scales come from `ops.quantize`, the operator, rules and view (BF16) of the forward pass, so the served
weights are the trained ones bit for bit; `verify.py` proves it with other code. Weights stream tensor by tensor
(`pack_tensors.py`) from memory-mapped files; the finished folder is renamed into place. Scales that do not follow from
the weights alone (see `tensor_scales.py`) are known before the first tensor.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import UserError
from ..files.atomic import check_target, disk_full_reported, written_atomically
from ..layers.kv_cache import check_cache_calibrated, kv_cache_spec
from ..layers.share import describe_sites
from ..layers.sites import LINEAR, Site, quantized_sites
from .companions import CODE, OF_IMAGES, OF_TEXT, copy_companions
from .device import choose_device, compute_on, in_words, most_bytes
from .dialects import AUTO, check_schemes, get_dialect, resolved_format
from .dialects.mxfp4 import experts_only
from .folder import CONFIG_NAME, CheckpointFolder
from .input_transforms import NOT_APPLIED, check_transforms, is_stored, transform_config
from .loadable import why_not_loadable
from .matrices import matrices_of
from .model_card import CardFacts, write_card
from .native_mxfp4 import is_native
from .pack_tensors import Packing
from .skeleton import UNTIED, prepared_skeleton
from .stored_names import StoredNames
from .targets import left_alone, target_schemes
from .tensor_scales import check_calibrated, stored_scales

logger = logging.getLogger(__name__)


def export_checkpoint(
    source: str | Path,
    target: str | Path,
    export_format: str = AUTO,
    scheme: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    overwrite: bool = False,
    facts: CardFacts | None = None,
    trust_remote_code: bool = False,
    calibrated_scales: Mapping[str, float] | None = None,
    kv_cache_scheme: str | None = None,
    device: str | None = None,
) -> Path:
    """Pack the checkpoint in `source` into the new folder `target`; `source` is only read.

    Args:
        source: a Hugging Face checkpoint in safetensors files, from QAT or plain.
        target: where the packed checkpoint goes.
        export_format: one of `dialects.EXPORT_FORMATS`; in gpt-oss's native one a `scheme` is of its experts.
        scheme: a scheme name or a mapping as in `prepare_qat`. Default: what the source was trained with.
        ignore: layers to leave alone, as in `prepare_qat`; with the default scheme, those of the training.
        overwrite: replace a packed checkpoint that is already there.
        facts: for the model card.
        trust_remote_code: run Python code that comes with the source, and copy it.
        calibrated_scales: as `QATConfig.calibrated_scales`, for schemes that need them and a source that has none: a
            plain one, or one that was trained in another scheme. Each is written under its name.
        kv_cache_scheme: as in `prepare_qat`, beside `scheme`; with the default scheme, that of the training.
        device: that quantizes, such as "cpu" or "cuda:1"; default: a GPU with enough free memory, else the CPU.

    Returns:
        `target`.

    Raises:
        UserError: see `CheckpointFolder.open`; or the source is packed already, has no scheme, lacks a weight, holds
            NaN or infinity in a weight; the format cannot hold the scheme; the scheme quantizes inputs under a scale
            that was not calibrated; or the target must not be overwritten.
        OSError: the disk is full. After any error nothing is left at `target`.
    """
    checkpoint, target = CheckpointFolder.open(source, "the source"), Path(target)
    dialect = get_dialect(resolved_format(export_format, checkpoint.config.get("model_type")))
    if checkpoint.is_packed:
        method = checkpoint.quantizer
        remedy = "export from the BF16 checkpoint it was made of"
        if is_native(checkpoint.path):
            remedy = "engines serve it as it is, and main.py trains it and packs the result"
        raise UserError(f"{source} is already quantized ({method}); {remedy}")
    if target.resolve() in (checkpoint.path.resolve(), *checkpoint.path.resolve().parents):
        raise UserError(f"the target {target} would replace the source {source}; name another folder")
    check_target(target, overwrite)
    if dialect.packs_fused and scheme is not None:
        scheme = experts_only({LINEAR.key: scheme} if isinstance(scheme, str) else scheme)
    model, qat_config, names = prepared_skeleton(
        checkpoint, scheme, ignore, trust_remote_code=trust_remote_code, calibrated_scales=calibrated_scales,
        kv_cache_scheme=kv_cache_scheme,
    )  # fmt: skip
    _log_surplus(model, names, checkpoint)
    sites = quantized_sites(model)
    matrices = matrices_of(names, sites, checkpoint.path, dialect.packs_fused)
    check_schemes(dialect, sites)
    check_transforms(dialect, sites)
    check_calibrated(sites)
    place = choose_device(device, most_bytes(checkpoint, matrices), "packing")
    logger.info("Packing %s as %s on %s", describe_sites(sites), dialect.name, in_words(place))
    quantization_config = dialect.config(
        target_schemes(model, sites, names), left_alone(model, sites, names, checkpoint.stored), kv_cache_spec(model)
    )
    quantization_config |= transform_config(sites, names)
    check_cache_calibrated(model)
    with disk_full_reported(target), written_atomically(target, overwrite) as folder:
        _check_space(folder, checkpoint, sites)
        scales = stored_scales(qat_config.calibrated_scales, matrices, names)
        packed_bytes = compute_on(
            place, device, "packing", lambda place: Packing(checkpoint, matrices, dialect, scales, place).write(folder)
        )
        _write_config(checkpoint, model, quantization_config, folder)
        code = CODE if trust_remote_code else ()  # only where it may run
        copy_companions(checkpoint.path, folder, (*OF_TEXT, *OF_IMAGES, *code))
        qat_config.save(folder)
        write_card(
            folder, str(target), checkpoint.path, facts or CardFacts(), qat_config, model, dialect,
            checkpoint.size_bytes, packed_bytes,
            why_not_loadable(model, names, quantization_config)
            or (NOT_APPLIED if is_stored(quantization_config) else None),
        )  # fmt: skip
    logger.info("Packed %s into %s: %.1f MiB", source, target, packed_bytes / 2**20)
    return target


def _log_surplus(model: PreTrainedModel, names: StoredNames, checkpoint: CheckpointFolder) -> None:
    """Log what is copied without being a part of the model, such as layers that predict several tokens ahead."""
    if surplus := names.surplus:
        logger.warning(
            "%s: %d tensors are no part of %s and are copied as they are, e.g. %s",
            checkpoint.path,
            len(surplus),
            type(model).__name__,
            surplus[0],
        )


def _write_config(
    checkpoint: CheckpointFolder, model: PreTrainedModel, quantization_config: dict, folder: Path
) -> None:
    config = dict(checkpoint.config)
    if not getattr(model.config, "tie_word_embeddings", False) and config.get("tie_word_embeddings"):
        logger.warning("%s: %s", checkpoint.path, UNTIED)
        config["tie_word_embeddings"] = False
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != "bfloat16":
        logger.warning("the source is in %s; what is not packed is exported in bfloat16", config.get(key, "float32"))
    config |= {key: "bfloat16", "quantization_config": quantization_config, "use_cache": True}
    _write_json(folder / CONFIG_NAME, config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path, checkpoint: CheckpointFolder, sites: list[Site]) -> None:
    weights = {id(site.weight): site for site in sites}.values()  # layers may share one
    saved_bits = sum(s.weight.numel() * (16 - s.scheme.weight.format.bits_per_value(s.shape[1])) for s in weights)
    needed, free = int(checkpoint.size_bytes - saved_bits / 8), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"the packed checkpoint needs {needed:,} bytes and {free:,} are free")
