"""The kernel on a GPU, or in Triton's interpreter, against plain PyTorch: equal bits."""

from __future__ import annotations

import pytest
import torch

from training.optimizers import triton_adamw
from training.optimizers.random_bits import keys
from training.optimizers.stochastic_adamw import Scalars, update_plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not triton_adamw.is_available(DEVICE), reason="neither a GPU with Triton nor TRITON_INTERPRET=1"
    ),
]


@pytest.mark.parametrize("first", [0, 1000, 2**32 + 17])
@pytest.mark.parametrize(("grad", "moments"), [
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
])  # fmt: skip
def test_the_kernel_has_the_bits_of_plain_pytorch(first, grad, moments):
    generator = torch.Generator().manual_seed(0)
    count = 5000
    scale = torch.exp2(torch.randint(-100, 20, (4, count), generator=generator).float())
    values = torch.randn(4, count, generator=generator) * scale
    values[1, :3] = torch.tensor([float("nan"), float("inf"), 0.0])
    dtypes = (torch.bfloat16, grad, moments, moments)
    tensors = [v.to(dtype) for v, dtype in zip((*values[:3], values[3].abs()), dtypes, strict=True)]
    group = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    scalars, pair = Scalars.of(group, 7), keys(1, 7, 3)
    expected, ours = [t.clone() for t in tensors], [t.clone().to(DEVICE) for t in tensors]
    update_plain(expected, scalars, pair, first)
    triton_adamw.update(ours, scalars, pair, first)
    for theirs, mine in zip(expected, ours, strict=True):
        integer = torch.int16 if theirs.dtype == torch.bfloat16 else torch.int32
        same = (theirs.view(integer) == mine.cpu().view(integer)) | (theirs.isnan() & mine.cpu().isnan())
        assert same.all(), (int((~same).sum()), theirs[~same][:4], mine.cpu()[~same][:4])
