"""A training does without cuDNN's attention, whose backward pass gives NaN under some masks."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from helpers import make_llama, make_tokenizer
from torch.nn.functional import scaled_dot_product_attention
from trainers import make_data

from training.backends.cuda_attention import attention_without_cudnn
from training.trainer import QATTrainer


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_training_turns_cudnn_attention_off_and_leaves_the_setting_as_it_was(tmp_path, monkeypatch, enabled, fails):
    seen = []

    class Watched(QATTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            if fails:
                raise KeyError("a step")
            return super().training_step(*args, **kwargs)

    args = transformers.TrainingArguments(
        str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    trainer = Watched(model=make_llama(), args=args, processing_class=make_tokenizer(), **make_data(tmp_path))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        if fails:
            with pytest.raises(KeyError):
                trainer.train()
        else:
            trainer.train()
        assert (seen, torch.backends.cuda.cudnn_sdp_enabled()) == ([False], enabled)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [448, 512])
def test_gradients_of_masked_attention_with_very_negative_scores_are_those_of_fp32(tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, tokens, 64, device="cuda", generator=generator) for _ in range(4))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1, -120 * math.sqrt(64)  # each score is near -120
    q, k, v, grad = (tensor.bfloat16() for tensor in (q, k, v, grad))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        with attention_without_cudnn():
            scaled_dot_product_attention(*inputs, attn_mask=mask[None, None]).backward(grad.to(dtype))
        return [tensor.grad.float() for tensor in inputs]

    for found, expected in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
