"""A training does without cuDNN's attention, whose backward pass gives NaN under some masks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import make_llama, make_tokenizer
from torch.nn.functional import scaled_dot_product_attention
from trainers import make_data

from training.backends.cuda_attention import attention_without_cudnn
from training.trainer import QATTrainer

LENGTHS = [(64, False, False), (96, False, True), (128, False, True), (192, False, False), (128, True, False)]


@pytest.mark.parametrize(("tokens", "compiled", "kept"), LENGTHS)
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_does_without_cudnn_where_it_gives_nan_and_leaves_the_setting_as_it_was(
    tokens, compiled, kept, enabled, fails
):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        with pytest.raises(KeyError) if fails else nullcontext(), attention_without_cudnn(tokens, compiled):
            assert torch.backends.cuda.cudnn_sdp_enabled() == (enabled and kept)
            if fails:
                raise KeyError("a step")
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(("tokens", "compiled", "kept"), LENGTHS)
def test_forward_and_backward_of_a_training_step_have_the_kernels_of_its_length(tmp_path, tokens, compiled, kept):
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return grad

    args = transformers.TrainingArguments(
        str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no",
        torch_compile=compiled, torch_compile_backend="eager" if compiled else None,
        gradient_checkpointing=True, per_device_train_batch_size=2,
    )  # fmt: skip
    model = make_llama()
    model.model.norm.register_forward_hook(lambda module, inputs, output: Watched.apply(output))
    trainer = QATTrainer(model=model, args=args, processing_class=make_tokenizer(), **make_data(tmp_path))
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: {
        name: torch.nn.functional.pad(column, (0, tokens - column.shape[1]), value=-100 if name == "labels" else 0)
        for name, column in collate(samples).items()
    }
    seen.clear()  # of what looked for the head
    trainer.train()
    assert len(seen) == 2 and set(seen) == {torch.backends.cuda.cudnn_sdp_enabled() and kept}


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ],
)
@pytest.mark.parametrize("tokens", [448, 512])
def test_gradients_of_masked_attention_with_very_negative_scores_are_those_of_fp32(tokens, device):
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, tokens, 64, device=device, generator=generator) for _ in range(4))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1, -120 * math.sqrt(64)  # each score is near -120
    q, k, v, grad = (tensor.bfloat16() for tensor in (q, k, v, grad))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        with attention_without_cudnn(tokens, compiled=False):
            scaled_dot_product_attention(*inputs, attn_mask=mask[None, None]).backward(grad.to(dtype))
        return [tensor.grad.float() for tensor in inputs]

    rounded, exact = gradients(torch.bfloat16), gradients(torch.float32)
    assert all(gradient.isfinite().all() for gradient in rounded)
    # q's first gradient is 0 in sum, of terms that are multiplied by 960: in BF16 it is their rounding
    rounded[0][..., 0], exact[0][..., 0] = 0, 0
    for found, expected in zip(rounded, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
