"""The tensors that a checkpoint in compressed-tensors' format has for experts, stacked as vLLM loads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from qat.numerics import ops
from qat.numerics.families import family_of, get_format
from qat.numerics.formats import BF16, E2M1, INT4, Format, Quantized

logger = logging.getLogger(f"vllm.{__name__}")

INPUT_DIVISOR = "input_global_scale"


def packed_tensors(
    fmt: Format, shape: tuple[int, ...], shards: tuple[int, ...] = ()
) -> dict[str, tuple[torch.Tensor, str | None]]:
    """Tensors to load experts' weights [E, N, K] into, by the file's names, with their kind in vLLM's loader.

    The kind of scales is "group", "channel" or "tensor"; that of other tensors None. Scales that files have in several
    dtypes are loaded in FP32. Divisors are NaN until they are loaded.

    Args:
        shards: () for one divisor an expert, or the number of matrices that are stacked along N.
    """
    storage = fmt.element.storage
    codes = torch.empty((*shape[:-1], shape[-1] * fmt.element.bits // (8 * storage.itemsize)), dtype=storage)
    scales = torch.empty(fmt.scale_shape(shape), dtype=torch.float32 if fmt.scale == BF16 else fmt.scale.storage)
    tensors: dict[str, tuple[torch.Tensor, str | None]] = {
        "weight_packed" if fmt.element in (E2M1, INT4) else "weight": (codes, None),
        "weight_scale": (scales, "channel" if fmt.block is None else "group"),
    }
    if fmt.element == INT4:
        tensors["weight_shape"] = torch.empty((shape[0], 2), dtype=torch.int64), None
    if fmt.tensor_scale is not None:
        for name in ("weight_global_scale", INPUT_DIVISOR):
            tensors[name] = torch.full((shape[0], *shards), torch.nan), "tensor"
    return tensors


def dequantized(stored: Mapping[str, torch.Tensor], fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The tensors of `packed_tensors` -> values [E, N, K] in `dtype`."""
    codes = stored["weight_packed" if "weight_packed" in stored else "weight"].contiguous().view(torch.uint8)
    scales, divisors = stored["weight_scale"], stored.get("weight_global_scale")
    count = codes.shape[0] if divisors is None else divisors.numel()  # of matrices
    rest = [scales.reshape(count, -1, scales.shape[-1])]
    if divisors is not None:
        rest.append(divisors.reshape(count, 1))
    # Kernels take scales of the training's dtype only.
    function = ops.dequantize if scales.dtype == fmt.scale.storage else _dequantize_plainly
    values = torch.empty((*codes.shape[:2], fmt.value_shape(codes)[-1]), dtype=dtype, device=codes.device)
    rows = zip(codes.reshape(count, -1, codes.shape[-1]), *rest, values.view(count, -1, values.shape[-1]), strict=True)
    for own, *own_scales, out in rows:
        out.copy_(function(Quantized(own, tuple(own_scales)), fmt.name, dtype))
    return values


def _dequantize_plainly(quantized: Quantized, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    return family_of(get_format(fmt)).dequantize(quantized, get_format(fmt), dtype)


def shared_divisor(divisors: torch.Tensor) -> torch.Tensor:
    """One divisor for the inputs of all experts, FP32 [1]: the smallest, under which no input of any is clipped.

    Raises:
        ValueError: the checkpoint has none for an expert.
    """
    if bool(divisors.isnan().any()):
        raise ValueError(f"the checkpoint quantizes inputs of experts and has no {INPUT_DIVISOR} for some of them")
    smallest = divisors.min().reshape(1)
    if bool((divisors != smallest).any()):
        logger.warning("mx-qat: experts differ in their scale of inputs; the largest range is taken for all")
    return smallest


def check_columns(fmt: Format, columns: int) -> None:
    """Raise a ValueError unless the blocks of a format divide what is summed over."""
    if not fmt.fits(columns):
        raise ValueError(
            f"experts sum over {columns} values in each process, which is no multiple of the block size {fmt.block} "
            f"of {fmt.name}; choose another --tensor-parallel-size"
        )
