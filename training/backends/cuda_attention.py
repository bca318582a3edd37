"""Which steps of a training on GPUs do without cuDNN's kernel of `scaled_dot_product_attention`.

With a mask, which padding and sliding windows need, the backward pass of that kernel gives NaN in the gradient of the
query on Hopper where the number of tokens is 64 more than a multiple of 128 and a query's log-sum-exp is below
ln(1 / FLT_MAX) = -88.7, which heads of Qwen2.5 reach (pytorch/pytorch#196678; PyTorch takes the kernel by default since
2.11). The forward pass is right, so the loss shows nothing. The memory-efficient kernel takes such masks too, and flash
attention what has none. They are slower (H200, torch 2.11, 14 layers of 1,536 channels: 1.03 times the step without
padding and 1.02 with it at 4 x 1,024 tokens, 1.07 and 1.33 at 2 x 4,096), so only steps of such lengths change, and
all steps of a compiled model, whose graph of one length may serve another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TILE, _HALF = 128, 64  # keys that the kernel reads at once, and what is left of the last tile where it fails


@contextmanager
def attention_without_cudnn(tokens: int, compiled: bool) -> Iterator[None]:
    """`scaled_dot_product_attention` does without cuDNN's kernel meanwhile, where that may give NaN.

    Args:
        tokens: of a row of the batch, padding included.
        compiled: whether torch.compile runs the model.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not compiled and tokens % _TILE != _HALF)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
