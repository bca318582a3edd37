"""Which kernels of `scaled_dot_product_attention` a training uses on GPUs: all but cuDNN's.

With a mask, which padding and sliding windows need, the backward pass of cuDNN's kernel gives NaN in the gradient of
the query on Hopper where the number of tokens is 64 more than a multiple of 128 and a query's log-sum-exp is below
ln(1 / FLT_MAX) = -88.7, which heads of Qwen2.5 reach (pytorch/pytorch#196678; PyTorch takes the kernel by default since
2.11). The forward pass is right, so the loss shows nothing. The memory-efficient kernel takes such masks too, and flash
attention what has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_without_cudnn() -> Iterator[None]:
    """`scaled_dot_product_attention` does not take cuDNN's kernel meanwhile; on CPUs nothing changes."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
