"""What an optimizer keeps and takes, in bytes: by the names of --optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

_SMALLEST = 4096  # elements of a parameter whose state 8-bit and 4-bit optimizers quantize


@dataclass(frozen=True)
class Kind:
    """Of an optimizer.

    Attributes:
        state: bytes kept for a parameter of a shape.
        temporaries: copies of the largest parameter, in FP32, that a step takes.
        copies_all: a GPU's step takes one more copy of all parameters, in FP32.
        pages: the state is in memory that the GPU shares with the main memory, and moves there.
    """

    state: Callable[[Shape], float]
    temporaries: float = 0.0
    copies_all: bool = False
    pages: bool = False


def _values(count: float) -> Callable[[Shape], float]:
    """FP32 values for each element."""
    return lambda shape: 4.0 * count * math.prod(shape)


def _quantized(count: int, bits: int, block: int, whole_blocks: bool) -> Callable[[Shape], float]:
    """Codes of `bits`, and an FP32 scale for each block; small parameters have FP32 values."""

    def state(shape: Shape) -> float:
        elements = math.prod(shape)
        if elements < _SMALLEST or (whole_blocks and elements % block):
            return 4.0 * count * elements
        return count * (elements * bits / 8 + 4 * math.ceil(elements / block))

    return state


def _factored(shape: Shape) -> float:
    """Adafactor's: FP32 means of rows and of columns; all elements of vectors."""
    if len(shape) < 2:
        return 4.0 * math.prod(shape)
    return 4.0 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _bnb(count: int, pages: bool = False) -> Kind:
    return Kind(_quantized(count, 8, 256, False), pages=pages)


_KINDS: dict[str, Kind] = {
    "adamw_torch": Kind(_values(2), 2, copies_all=True),
    "adamw_torch_fused": Kind(_values(2)),
    "adamw_torch_8bit": Kind(_quantized(2, 8, 256, True), 3),
    "adamw_torch_4bit": Kind(_quantized(2, 4, 128, True), 3),
    "adafactor": Kind(_factored, 2),
    "adamw_bnb_8bit": _bnb(2), "adamw_8bit": _bnb(2), "paged_adamw_8bit": _bnb(2, True),
    "paged_adamw_32bit": Kind(_values(2), pages=True),
    "ademamix": Kind(_values(3)), "ademamix_8bit": _bnb(3), "paged_ademamix_8bit": _bnb(3, True),
    "paged_ademamix_32bit": Kind(_values(3), pages=True),
    "lion_32bit": Kind(_values(1)), "lion_8bit": _bnb(1), "paged_lion_8bit": _bnb(1, True),
    "paged_lion_32bit": Kind(_values(1), pages=True),
    "rmsprop_bnb": Kind(_values(1)), "rmsprop_bnb_32bit": Kind(_values(1)), "rmsprop_bnb_8bit": _bnb(1),
    "adagrad": Kind(_values(1), 2, copies_all=True),
    "rmsprop": Kind(_values(1), 2, copies_all=True),
    "sgd": Kind(_values(0)),
    "muon": Kind(_values(1), 3),
}  # fmt: skip
_OPTIONAL = {"sgd": ("momentum",), "rmsprop": ("momentum", "centered")}  # arguments that add an FP32 value each


def is_known(name: str) -> bool:
    """Whether the state of an optimizer is known; else that of AdamW is taken."""
    return name in _KINDS


def _kind(name: str) -> Kind:
    return _KINDS.get(name, _KINDS["adamw_torch"])


def state_bytes(name: str, arguments: str, shapes: Iterable[Shape], moment_dtype: torch.dtype, device: str) -> int:
    """Bytes of the states of parameters.

    Args:
        name, arguments: --optim and --optim_args.
        moment_dtype: BF16 where AdamW trains parameters without FP32 masters.
        device: "cuda" or "cpu"; paged states are not counted on a GPU.
    """
    kind = _kind(name)
    if kind.pages and device != "cpu":
        return 0
    more = _values(sum(1 for key in _OPTIONAL.get(name, ()) if _is_given(key, arguments)))
    total = sum(kind.state(shape) + more(shape) for shape in shapes)
    return int(total * moment_dtype.itemsize / 4) if name.startswith("adamw_torch") else int(total)


def temporary_bytes(name: str, elements: list[int], device: str) -> int:
    """Bytes that a step takes while it runs, for parameters of so many elements."""
    kind = _kind(name)
    if not elements:
        return 0
    if kind.copies_all and device != "cpu":
        return 4 * sum(elements)
    return int(4 * kind.temporaries * max(elements))


def _is_given(key: str, arguments: str) -> bool:
    values = dict(pair.partition("=")[::2] for pair in arguments.replace(" ", "").split(",") if pair)
    return values.get(key, "0").lower() not in ("0", "0.0", "false")
