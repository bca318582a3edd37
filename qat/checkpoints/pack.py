"""Pack a checkpoint in BF16 into codes and scales that inference engines load as they are.

The codes and scales come from `ops.quantize`, the operator, rules and view (BF16) of the forward pass, so the served
weights are the trained ones bit for bit; `verify.py` proves it with other code. Weights stream shard by shard: one
source shard is memory-mapped while its packed counterpart is built; the finished folder is renamed into place. Scales
that do not follow from the weights alone (see `tensor_scales.py`) are known before the first shard.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import UserError
from ..files.atomic import check_target, disk_full_reported, written_atomically
from ..layers.kv_cache import check_cache_calibrated, kv_cache_spec
from ..layers.rounding import Rounding
from ..layers.share import describe_sites
from ..layers.sites import LINEAR, Site, quantized_sites
from ..numerics import ops
from ..numerics.families import family_of
from ..numerics.formats import Quantized
from ..schemes.spec import VIEW_DTYPE, TensorSpec
from .companions import CODE, OF_IMAGES, OF_TEXT, copy_companions
from .dialects import AUTO, Dialect, check_schemes, get_dialect, resolved_format
from .dialects.mxfp4 import experts_only
from .fit import check_finite
from .folder import CONFIG_NAME, INDEX_NAME, CheckpointFolder
from .loadable import why_not_loadable
from .matrices import Matrix, matrices_of
from .model_card import CardFacts, write_card
from .native_mxfp4 import is_native
from .skeleton import UNTIED, prepared_skeleton
from .stored_names import StoredNames
from .targets import left_alone, target_schemes
from .tensor_scales import calibrated_tensors, check_calibrated, stored_scales, weight_divisors

logger = logging.getLogger(__name__)

_SLAB_VALUES = 1 << 22  # quantized at a time where there are no kernels; bounds the FP32 temporaries
_WEIGHT = ".weight"


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
    check_calibrated(sites)
    logger.info("Packing %s as %s", describe_sites(sites), dialect.name)
    quantization_config = dialect.config(
        target_schemes(model, sites, names), left_alone(model, sites, names, checkpoint.stored), kv_cache_spec(model)
    )
    check_cache_calibrated(model)
    with disk_full_reported(target), written_atomically(target, overwrite) as folder:
        _check_space(folder, checkpoint, sites)
        scales = stored_scales(qat_config.calibrated_scales, matrices, names)
        packed_bytes = _write_shards(checkpoint, matrices, dialect, scales, folder)
        _write_config(checkpoint, model, quantization_config, folder)
        code = CODE if trust_remote_code else ()  # only where it may run
        copy_companions(checkpoint.path, folder, (*OF_TEXT, *OF_IMAGES, *code))
        qat_config.save(folder)
        write_card(
            folder, str(target), checkpoint.path, facts or CardFacts(), qat_config, model, dialect,
            checkpoint.size_bytes, packed_bytes, why_not_loadable(model, names, quantization_config),
        )  # fmt: skip
    logger.info("Packed %s into %s: %.1f MiB", source, target, packed_bytes / 2**20)
    return target


def pack_weight(
    weight: torch.Tensor, spec: TensorSpec, divisor: torch.Tensor | None = None, rounding: Rounding | None = None
) -> Quantized:
    """Codes and scales of a weight [N, K] of any float dtype; its BF16 view is quantized.

    Args:
        divisor: FP32 [1], in formats with a tensor scale; default: that of this weight.
        rounding: of a layer; default: that of the spec.
    """
    rounding = rounding or Rounding(spec)
    if divisor is None and spec.format.tensor_scale is not None:
        divisor = ops.tensor_divisor([weight], spec.format.name, VIEW_DTYPE)
    step = weight.shape[0] if ops.has_kernels(weight, spec.format.name) else max(1, _SLAB_VALUES // weight.shape[1])
    slabs = [rounding.quantize(slab, VIEW_DTYPE, divisor=divisor) for slab in weight.split(step)]
    if len(slabs) == 1:
        return slabs[0]
    codes = torch.cat([slab.codes for slab in slabs])
    block_scales = torch.cat([slab.scales[0] for slab in slabs])
    return Quantized(codes, (block_scales, *slabs[0].scales[1:]))  # the rest is of the whole tensor


def exported_dtype(tensor: torch.Tensor, config: dict) -> torch.dtype:
    """The dtype that an unquantized tensor is exported in: its own, but BF16 for the main dtype of a wider model."""
    main = config.get("dtype") or config.get("torch_dtype") or "float32"
    return VIEW_DTYPE if tensor.dtype == getattr(torch, main) and tensor.is_floating_point() else tensor.dtype


def _write_shards(
    checkpoint: CheckpointFolder,
    matrices: Mapping[str, list[Matrix]],
    dialect: Dialect,
    scales: Mapping[str, float],
    folder: Path,
) -> int:
    """Write one packed file for each file of the source, and their index; returns the bytes of all tensors."""
    divisors = weight_divisors(checkpoint, matrices)
    calibrated = calibrated_tensors(checkpoint, scales)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with tqdm(total=checkpoint.size_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="Packing") as progress:
        for file in checkpoint.shards:
            packed: dict[str, torch.Tensor] = calibrated[file]
            for name, tensor in checkpoint.tensors(file):
                for matrix in matrices.get(name, ()):
                    packed |= _pack_matrix(matrix, matrix.values(tensor), dialect, divisors.get(matrix.name))
                if name not in matrices:
                    check_finite([(name, tensor)], checkpoint.path)
                    packed[name] = tensor.to(exported_dtype(tensor, checkpoint.config))
                progress.update(tensor.nbytes)
            save_file(packed, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(packed, file)
            total_bytes += sum(tensor.nbytes for tensor in packed.values())
    if len(checkpoint.shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_NAME, index)
    return total_bytes


def _pack_matrix(
    matrix: Matrix, weight: torch.Tensor, dialect: Dialect, divisor: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of a matrix by their names in the file."""
    spec = matrix.spec
    quantized = pack_weight(weight.contiguous(), spec, divisor, matrix.site.module.weight_quantizer.rounding)
    if broken := int(family_of(spec.format).broken_blocks(quantized, spec.format)):
        raise UserError(f"{matrix.name}{_WEIGHT} holds NaN or infinity in {broken} blocks; did the training diverge?")
    if matrix.is_fused:
        experts = (matrix.site.weight.shape[0], -1)
        scales = tuple(scale.unflatten(0, experts) for scale in quantized.scales)
        quantized = Quantized(quantized.codes.unflatten(0, experts), scales)
    return dict(zip(dialect.tensor_names(matrix.name, spec), dialect.tensors(quantized, spec), strict=True))


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
