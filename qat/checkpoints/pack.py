"""Export: a folder with BF16 weights in, a folder with packed MX weights out, which inference engines load as it is.

The codes and scales come from `ops.quantize`, the operator, rules and view (BF16) of the forward pass, so the served
weights are the trained ones bit for bit; `verify.py` proves it with other code. Weights stream shard by shard: one
source shard is memory-mapped while its packed counterpart is built; the finished folder is renamed into place.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..files.atomic import check_target, disk_full_said, written_aside
from ..numerics import ops
from ..numerics.formats import BLOCK_SIZE, E8M0_NAN
from ..schemes.spec import LayerScheme, TensorSpec
from .dialects.compressed_tensors import check_export_format, make_quantization_config
from .folder import CONFIG_NAME, INDEX_NAME, CheckpointFolder
from .model_card import CardFacts, write_card
from .skeleton import describe_layers, prepared_skeleton, quantized_layers, unquantized_layers

logger = logging.getLogger(__name__)

VIEW_DTYPE = torch.bfloat16  # the forward pass computes in BF16 autocast, and so do the engines
_SLAB_VALUES = 1 << 22  # quantized at a time where there are no kernels; bounds the FP32 temporaries
_COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "*processor_config.json", "*.py", "LICENSE*",
)  # fmt: skip


def export_checkpoint(
    source: str | Path,
    target: str | Path,
    export_format: str = "compressed-tensors",
    scheme: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    overwrite: bool = False,
    facts: CardFacts | None = None,
) -> Path:
    """Pack the checkpoint in `source` into the new folder `target`; `source` is only read.

    Args:
        source: a Hugging Face checkpoint in safetensors files, from QAT or plain.
        target: where the packed checkpoint goes.
        export_format: one of `packed_config.EXPORT_FORMATS`.
        scheme: a scheme name or a mapping as in `prepare_qat`. Default: what the source was trained with.
        ignore: layers to leave alone, as in `prepare_qat`; with the default scheme, those of the training.
        overwrite: replace a packed checkpoint that is already there.
        facts: for the model card.

    Returns:
        `target`.

    Raises:
        ValueError: see `CheckpointFolder.open`; or the source is packed already, has no scheme, lacks a weight, holds
            NaN or infinity in a weight; the format cannot hold the scheme; or the target must not be overwritten.
        OSError: the disk is full. After any error nothing is left at `target`.
    """
    check_export_format(export_format)
    checkpoint, target = CheckpointFolder.open(source), Path(target)
    if checkpoint.quantization_config is not None:
        method = checkpoint.quantization_config.get("quant_method")
        raise ValueError(f"{source} is already quantized ({method}); export from the BF16 checkpoint it was made of")
    if target.resolve() in (checkpoint.path.resolve(), *checkpoint.path.resolve().parents):
        raise ValueError(f"the target {target} would replace the source {source}; name another folder")
    check_target(target, overwrite)
    model, qat_config = prepared_skeleton(checkpoint, scheme, ignore)
    layers = quantized_layers(model)
    logger.info("Packing %s as %s", describe_layers(layers), export_format)
    quantization_config = make_quantization_config(export_format, layers, unquantized_layers(model, checkpoint))
    with disk_full_said(target), written_aside(target, overwrite) as folder:
        _check_space(folder, checkpoint, layers, model)
        packed_bytes = _write_shards(checkpoint, layers, folder)
        _write_config(checkpoint, quantization_config, folder)
        _copy_companions(checkpoint.path, folder)
        qat_config.save(folder)
        write_card(
            folder, str(target), checkpoint.path, facts or CardFacts(), qat_config, layers, export_format,
            checkpoint.size_bytes, packed_bytes,
        )  # fmt: skip
    logger.info("Packed %s into %s: %.1f MiB", source, target, packed_bytes / 2**20)
    return target


def pack_weight(weight: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight, in the bytes that engines load.

    Args:
        weight: [N, K], any float dtype, K a multiple of 32; its BF16 view is quantized.

    Returns:
        MXFP4: uint8 [N, K / 2], element 2i in the low nibble; MXFP8: float8_e4m3fn [N, K]. And the E8M0 scales,
        uint8 [N, K / 32], exponent + 127.
    """
    step = weight.shape[0] if ops.has_kernels(weight) else max(1, _SLAB_VALUES // weight.shape[1])
    slabs = [ops.quantize(slab, spec.format_name, spec.scale_rule, VIEW_DTYPE) for slab in weight.split(step)]
    packed, scale_e8m0_biased = slabs[0] if len(slabs) == 1 else map(torch.cat, zip(*slabs, strict=True))
    return (packed.view(torch.float8_e4m3fn) if spec.bits == 8 else packed), scale_e8m0_biased


def packed_name(layer: str, spec: TensorSpec) -> str:
    """What the codes of `layer` are called in a packed checkpoint; its scales are `LAYER.weight_scale`."""
    return f"{layer}.weight_packed" if spec.bits == 4 else f"{layer}.weight"


def exported_dtype(tensor: torch.Tensor, config: dict) -> torch.dtype:
    """The dtype that an unquantized tensor is exported in: its own, but BF16 for the main dtype of a wider model."""
    main = config.get("dtype") or config.get("torch_dtype") or "float32"
    return VIEW_DTYPE if tensor.dtype == getattr(torch, main) and tensor.is_floating_point() else tensor.dtype


def _write_shards(checkpoint: CheckpointFolder, layers: dict[str, LayerScheme], folder: Path) -> int:
    """Write one packed file for each file of the source, and their index; returns the bytes of all tensors."""
    by_weight = {f"{name}.weight": (name, scheme.weight) for name, scheme in layers.items()}
    weight_map, total_bytes = {}, 0
    with tqdm(total=checkpoint.size_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="Packing") as progress:
        for file in checkpoint.shards:
            packed = {}
            for name, tensor in checkpoint.tensors(file):
                if name in by_weight:
                    packed.update(_pack_layer(name, tensor, *by_weight[name]))
                else:
                    packed[name] = tensor.to(exported_dtype(tensor, checkpoint.config))
                progress.update(tensor.nbytes)
            save_file(packed, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(packed, file)
            total_bytes += sum(tensor.nbytes for tensor in packed.values())
    if len(checkpoint.shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_NAME, index)
    return total_bytes


def _pack_layer(weight_name: str, weight: torch.Tensor, layer: str, spec: TensorSpec) -> dict[str, torch.Tensor]:
    packed, scale = pack_weight(weight, spec)
    if scale.numpy().max(initial=0) == E8M0_NAN:  # PyTorch's reduction waits for all threads: dear on a busy machine
        broken = int((scale == E8M0_NAN).sum())
        raise ValueError(f"{weight_name} holds NaN or infinity in {broken} blocks; did the training diverge?")
    return {packed_name(layer, spec): packed, f"{layer}.weight_scale": scale}


def _write_config(checkpoint: CheckpointFolder, quantization_config: dict, folder: Path) -> None:
    config = dict(checkpoint.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != "bfloat16":
        logger.warning("the source is in %s; what is not packed is exported in bfloat16", config.get(key, "float32"))
    config |= {key: "bfloat16", "quantization_config": quantization_config, "use_cache": True}
    _write_json(folder / CONFIG_NAME, config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, chat template: everything that a served model needs beside weights and config."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _COMPANIONS):
            shutil.copyfile(path, folder / path.name)


def _check_space(folder: Path, checkpoint: CheckpointFolder, layers: dict[str, LayerScheme], model: nn.Module) -> None:
    saved = sum(
        model.get_submodule(name).weight.numel() * (16 - 8 / BLOCK_SIZE - scheme.weight.bits) / 8
        for name, scheme in layers.items()
    )
    needed, free = int(checkpoint.size_bytes - saved), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"the packed checkpoint needs {needed:,} bytes and {free:,} are free")
