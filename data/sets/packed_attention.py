"""Attention of packed rows at the cost of their samples: no mask of tokens x tokens, no scores between samples.

For packed rows, transformers (5.23) gives `sdpa` a mask of [rows, 1, tokens, tokens]. It takes 256 MiB a row of 16,384
tokens, rules out flash attention, and all scores of a row are computed, whatever samples it has. `packed_sdpa` reads
the borders of samples from `position_ids`: one call of PyTorch's own flash attention with varying lengths on a GPU, and
elsewhere one causal `scaled_dot_product_attention` a sample. Sliding windows, padding and what else needs a mask are
left to `sdpa`.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)

NAME = "packed_sdpa"
_TOLERANCE = 1e-3  # of the logits' size: another order of sums is below, another mask above
_TOLERANCE_HALF = 2e-2  # of attention in BF16 and its gradients: roundings are below
_LARGEST_HEAD = 256  # of flash attention


@dataclass(frozen=True)
class Borders:
    """Where samples begin in a batch of packed rows, joined to one row.

    Attributes:
        edges: begin of each sample, and the number of all tokens; int32 on the device. on_host: the same.
        rows: of the batch.
    """

    edges: torch.Tensor
    on_host: list[int]
    rows: int

    @classmethod
    def of(cls, position_ids: torch.Tensor) -> Borders:
        """From [rows, tokens]: a sample begins with each row, and wherever a position does not follow the one before.

        Waits for the device.
        """
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
        edges = functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
        return cls(edges, edges.tolist(), len(position_ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - begin for begin, end in zip(self.on_host, self.on_host[1:], strict=False))

    @property
    def samples(self) -> int:
        return len(self.on_host) - 1


class _Latest:
    """The borders of the latest batch; its layers, and a recomputation, come with the same tensor."""

    def __init__(self) -> None:
        self.of_tensor, self.borders = (lambda: None), None

    def get(self, position_ids: torch.Tensor, rows: int) -> Borders:
        if self.of_tensor() is not position_ids:
            self.of_tensor, self.borders = weakref.ref(position_ids), Borders.of(position_ids.expand(rows, -1))
        return self.borders


_latest = _Latest()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: [rows, heads, tokens, size] -> [rows, tokens, heads, size], and no weights.

    Keys and values may have fewer heads. With a mask, or one sample a row, it is transformers' own `sdpa`.
    """
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        borders = _latest.get(position_ids, len(query))
        if borders.samples > borders.rows:
            if torch.is_autocast_enabled(query.device.type):
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            is_lengthwise = dropout == 0.0 and takes_lengths(
                query.device, query.dtype, *query.shape[1::2], key.shape[1]
            )
            compute = with_lengths if is_lengthwise else sample_by_sample
            return compute(query, key, value, borders, scaling, dropout), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs
    )


@functools.cache
def takes_lengths(device: torch.device, dtype: torch.dtype, heads: int, size: int, key_heads: int) -> bool:
    """Whether PyTorch's flash attention with varying lengths gives what attention sample by sample gives, gradients
    included: tried once on random values. Elsewhere than on GPUs there is none."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or size > _LARGEST_HEAD or size % 8:
        return False
    try:
        found, expected = (
            _trial(compute, device, dtype, heads, size, key_heads) for compute in (with_lengths, sample_by_sample)
        )
        reason = "its results differ"
        if all((a - b).norm() <= _TOLERANCE_HALF * b.norm() for a, b in zip(found, expected, strict=True)):
            return True
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    logger.warning("packed rows are attended sample by sample, not by flash attention with lengths: %s", reason)
    return False


def _trial(
    compute: Callable, device: torch.device, dtype: torch.dtype, heads: int, size: int, key_heads: int
) -> list[torch.Tensor]:
    """The result and the gradients of attention in two rows of two samples each, FP32."""
    positions = torch.cat([torch.arange(n, device=device) for n in (70, 58, 3, 125)]).view(2, 128)
    generator = torch.Generator(device).manual_seed(0)
    # Hooks of its own: activation checkpointing would count what the trial saves.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        inputs = [
            torch.randn(2, n, 128, size, generator=generator, device=device, dtype=dtype).requires_grad_()
            for n in (heads, key_heads, key_heads)
        ]
        result = compute(*inputs, Borders.of(positions), None)
        grad = torch.randn(result.shape, generator=generator, device=device, dtype=dtype)
        return [tensor.float() for tensor in (result.detach(), *torch.autograd.grad(result, inputs, grad))]


def with_lengths(query, key, value, borders: Borders, scaling: float | None, dropout: float = 0.0) -> torch.Tensor:
    """All samples by one call of PyTorch's flash attention, on a GPU."""
    rows, _, tokens, _ = query.shape
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    edges, longest = borders.edges, borders.longest
    result = torch.ops.aten._flash_attention_forward(
        query, key, value, edges, edges, longest, longest, dropout, True, False, scale=scaling
    )
    return result[0].unflatten(0, (rows, tokens))


def sample_by_sample(query, key, value, borders: Borders, scaling: float | None, dropout: float = 0.0) -> torch.Tensor:
    """Each sample by itself: what `with_lengths` computes, on every device."""
    tokens, parts = query.shape[2], []
    for begin, end in zip(borders.on_host, borders.on_host[1:], strict=False):
        row, first = divmod(begin, tokens)
        sample = (slice(row, row + 1), slice(None), slice(first, first + end - begin))
        parts.append(
            functional.scaled_dot_product_attention(
                query[sample], key[sample], value[sample], dropout_p=dropout, is_causal=True, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
        )  # fmt: skip
    return torch.cat(parts, 1).view(len(query), tokens, query.shape[1], value.shape[3])


def packed_mask(**kwargs) -> torch.Tensor | None:
    """A mask of transformers' interface: none for causal attention within samples, else that of `sdpa`."""
    is_plain = (
        "allow_is_causal_skip" in kwargs
        and kwargs.get("attention_mask") is None
        and kwargs.get("local_size") is None
        and not kwargs.get("use_vmap")
        and kwargs["q_length"] == kwargs["kv_length"]
    )
    return None if is_plain else sdpa_mask(**kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)


def attend_within_samples(model: PreTrainedModel | object, compiles: bool = False) -> bool:
    """Switch a model from `sdpa` to `packed_sdpa` if both compute the same for a packed row; whether it did.

    Under FSDP the first process decides, which has the weights; all of them must call it.

    Args:
        model: what is not a model of transformers stays as it is.
        compiles: whether torch.compile is going to compile it. Then it keeps `sdpa`: the graph would end wherever the
            borders of samples are read.
    """
    if compiles or not isinstance(model, PreTrainedModel):
        return False
    decided = [False]
    if not any(parameter.is_meta for parameter in model.parameters()):
        decided = [model.config._attn_implementation == "sdpa" and _computes_the_same(model)]
    if PartialState._shared_state and PartialState().num_processes > 1:
        broadcast_object_list(decided)
    if decided[0]:
        model.set_attn_implementation(NAME)
        logger.info("Attention is computed within each sample of a packed row, without a mask of tokens x tokens")
    return decided[0]


@torch.no_grad()
def _computes_the_same(model: PreTrainedModel) -> bool:
    """Whether logits of a packed row are those of `sdpa`; False too for a model that takes no other attention."""
    if not model._can_set_attn_implementation():
        return False
    device, was_training = model.device, model.training
    tokens = torch.arange(24, device=device)[None] * 7 % model.get_input_embeddings().num_embeddings
    inputs = {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n, device=device) for n in (9, 15)])[None]}
    model.eval()
    try:
        expected = model(**inputs, use_cache=False).logits.float()
        model.set_attn_implementation(NAME)
        found = model(**inputs, use_cache=False).logits.float()
    except (TypeError, NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        logger.info("%s keeps sdpa with a mask for packed rows (%s)", type(model).__name__, error)
        return False
    finally:
        model.set_attn_implementation("sdpa")
        model.train(was_training)
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())
