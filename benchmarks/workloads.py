"""Models, batches and training steps that the benchmarks share.

The BF16 step is what `main.py` does without a scheme: FP32 master weights, BF16 autocast, the loss from hidden states
in chunks, AdamW. The QAT step is the same with a prepared model. Weights are random: speed and memory do not depend on
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qat import prepare_qat
from qat.layers.calibration import calibrate_inputs
from qat.layers.fp8_matmul import use_fp8_matmul
from training.losses.chunked import attach, find_head
from training.losses.distillation import Objective

if TYPE_CHECKING:
    from training.teachers.frozen import FrozenTeacher

# name -> (hidden, intermediate, layers, heads, key-value heads, vocabulary, tied)
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "wide": (2048, 5632, 4, 16, 4, 8192, True),
    "llama-8b": (4096, 14336, 4, 32, 8, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}


def llama_config(shape: str, layers: int = 0) -> LlamaConfig:
    """The configuration of a shape; `layers` overrides its depth."""
    hidden, intermediate, depth, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip


def make_model(
    shape: str,
    scheme: str | None,
    layers: int = 0,
    device: str = "cpu",
    checkpointing: bool = False,
    calibrated: bool = True,
    fp8_matmul: str = "auto",
    input_transform: str | None = None,
) -> LlamaForCausalLM:
    """A random Llama in FP32, prepared for `scheme` unless it is None; `layers` overrides the shape's depth."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(shape, layers))
    prepare(model, scheme, checkpointing, calibrated, input_transform)
    use_fp8_matmul(model, fp8_matmul, model.device)
    return model


def prepare(
    model: LlamaForCausalLM,
    scheme: str | None,
    checkpointing: bool = False,
    calibrated: bool = True,
    input_transform: str | None = None,
) -> LlamaForCausalLM:
    """A model prepared for `scheme` unless it is None, in training mode; on the meta device nothing is calibrated."""
    if scheme is not None:
        prepare_qat(model, {nn.Linear: scheme}, input_transforms=input_transform)
        if calibrated:
            calibrate_inputs(model, [{"input_ids": torch.arange(64, device=model.device)[None]}])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_batch(model: LlamaForCausalLM, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens [batch, length], every one labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    return {"input_ids": ids, "labels": ids}


class TrainingStep:
    """Forward, backward and AdamW on one batch, over and over.

    Args:
        teacher: learn its distributions (forward KL) instead of the labels.
        whole_logits: compute the loss as transformers does, from the logits of the whole batch.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        batch: dict[str, torch.Tensor],
        compiled: bool = False,
        teacher: FrozenTeacher | None = None,
        whole_logits: bool = False,
    ) -> None:
        self.model, self.batch, self.teacher, self.whole_logits = model, batch, teacher, whole_logits
        attach(model, find_head(model))
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def loss(self) -> torch.Tensor:
        """Forward in BF16 autocast."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            if self.whole_logits:
                return self.run(**self.batch).loss
            teacher = None if self.teacher is None else self.teacher.rows(self.batch)
            objective = Objective(self.batch["labels"], teacher, {"ce": 1.0} if teacher is None else {"kl": 1.0})
            losses = self.run(input_ids=self.batch["input_ids"], objective=objective)
            return losses["loss"] / len(objective.targets)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Forward only."""
        self.loss()


def saved_bytes_of_a_block(model: LlamaForCausalLM, tokens: int) -> int:
    """Bytes that one decoder block keeps for backward: every saved tensor's storage once, parameters left out."""
    block, device = model.model.layers[0], model.device
    hidden = torch.randn(1, tokens, model.config.hidden_size, device=device, requires_grad=True)
    positions = torch.arange(tokens, device=device)[None]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()} | {hidden.untyped_storage().data_ptr()}
    storages: dict[int, int] = {}
    kept = []  # alive until counted, so that no address is used twice

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor.detach()  # with its graph, a tensor that its own node saves would never be freed

    with torch.autocast(device.type, torch.bfloat16):
        embeddings = model.model.rotary_emb(hidden, positions)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            block(hidden, position_embeddings=embeddings, position_ids=positions)
    return sum(storages.values())
