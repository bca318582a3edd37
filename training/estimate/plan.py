"""Plan: what the memory of a run depends on, beside the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..arguments.lora import ALL_LINEAR
from ..arguments.parse import Arguments

ONE, DDP, FSDP1, FSDP2 = BACKENDS = ("one", "ddp", "fsdp1", "fsdp2")
NO_TEACHER, COPY, CACHE, SELF = "none", "copy", "cache", "self"


@dataclass(frozen=True)
class Backend:
    """How processes share a run.

    Attributes:
        name: one of BACKENDS.
        processes: of all machines.
        keeps_gathered: layers stay gathered between the forward and the backward pass.
        offloads: shards, gradients and the optimizer are in the main memory.
        checkpoints: the setting fsdp_activation_checkpointing.
    """

    name: str = ONE
    processes: int = 1
    keeps_gathered: bool = False
    offloads: bool = False
    checkpoints: bool = False

    @property
    def shards(self) -> bool:
        """Whether each process has a part of every parameter."""
        return self.name in (FSDP1, FSDP2)

    @property
    def parts(self) -> int:
        """Into how many parts parameters, gradients and moments are cut."""
        return self.processes if self.shards else 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Backend:
        """The one that `accelerate launch` has written into the environment; one process without it."""

        def is_on(name: str) -> bool:
            return environment.get(name, "").lower() in ("true", "1")

        processes = int(environment.get("WORLD_SIZE", "1"))
        if not is_on("ACCELERATE_USE_FSDP"):
            return cls(DDP if processes > 1 else ONE, processes)
        version = environment.get("FSDP_VERSION", "1")
        strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        keeps = strategy in ("SHARD_GRAD_OP", "2") if version == "1" else not is_on("FSDP_RESHARD_AFTER_FORWARD")
        return cls(
            FSDP1 if version == "1" else FSDP2, processes, keeps and processes > 1, is_on("FSDP_OFFLOAD_PARAMS"),
            is_on("FSDP_ACTIVATION_CHECKPOINTING"),
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What the memory of a run depends on, beside the model and its schemes.

    Attributes:
        batch: samples of a process that are computed at once.
        length: tokens of each.
        trains: False for an evaluation.
        compute_dtype: of autocast; FP32 for none.
        accumulates: gradients exist while the next batch is computed.
        masked: attention gets a mask (padding; packed samples where a compiler is to come).
        packed: rows hold several samples. Without `masked`, attention is computed within each (packed_attention.py).
        optimizer: --optim. optimizer_args: --optim_args.
        master_dtype: in which parameters are trained.
        moment_dtype: of AdamW's moments, where these are trained in BF16.
        in_backward: each gradient is freed as soon as the optimizer has used it.
        checkpointing: arguments of activation checkpointing; None without it.
        teacher: NO_TEACHER, COPY (a frozen model), CACHE or SELF.
        teacher_tokens: of each distribution in the cache.
        ce_weight: of cross-entropy beside the divergence.
        lora_r: rank of adapters; 0 trains all parameters.
        lora_target: see `fake_model.with_adapters`; of a model without adapters.
        base_in_scheme: adapters are trained on a packed base.
        gather_dtype: in which FSDP gathers parameters.
        smooths_labels: the loss needs the logits of a whole batch.
        compiled: by torch.compile.
        device: "cuda" or "cpu".
    """

    batch: int
    length: int
    trains: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    accumulates: bool = False
    masked: bool = False
    packed: bool = False
    optimizer: str = "adamw_torch_fused"
    optimizer_args: str = ""
    master_dtype: torch.dtype = torch.float32
    moment_dtype: torch.dtype = torch.bfloat16
    in_backward: bool = False
    checkpointing: tuple[tuple[str, object], ...] | None = None
    teacher: str = NO_TEACHER
    teacher_tokens: int = 32
    ce_weight: float = 0.0
    lora_r: int = 0
    lora_target: str = ALL_LINEAR
    base_in_scheme: bool = False
    gather_dtype: torch.dtype = torch.float32
    smooths_labels: bool = False
    compiled: bool = False
    device: str = "cuda"
    backend: Backend = Backend()

    @property
    def checkpoints(self) -> bool:
        """Whether decoder layers are computed again in the backward pass."""
        return self.checkpointing is not None or self.backend.checkpoints

    @property
    def teaches(self) -> bool:
        """Whether the loss has a divergence from a teacher."""
        return self.teacher != NO_TEACHER

    def on(self, name: str, processes: int) -> Plan:
        """This plan on another backend."""
        return replace(self, backend=replace(self.backend, name=name, processes=processes))


def plan_of(arguments: Arguments, backend: Backend, device: str, lora_r: int = 0) -> Plan:
    """The plan of a command of main.py.

    Args:
        lora_r: rank of the model's adapters.
    """
    args, data, distill = arguments.training, arguments.data, arguments.distillation
    teacher = distill.distill_teacher if distill.distill else NO_TEACHER
    if distill.teacher_model_name_or_path is not None and teacher == SELF:
        teacher = COPY
    checkpoints = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    given = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    batch = args.per_device_train_batch_size if args.do_train else args.per_device_eval_batch_size
    return Plan(
        batch=batch,
        length=args.model_max_length,
        trains=bool(args.do_train),
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        accumulates=args.gradient_accumulation_steps > 1,
        masked=bool(args.torch_compile) if data.packing else batch > 1,
        packed=data.packing,
        optimizer=getattr(args.optim, "value", args.optim),
        optimizer_args=args.optim_args or "",
        master_dtype=getattr(torch, args.master_dtype),
        moment_dtype=getattr(torch, args.moment_dtype),
        in_backward=args.optimizer_in_backward,
        checkpointing=tuple(sorted(given.items())) if checkpoints else None,
        teacher=teacher,
        teacher_tokens=distill.distill_top_k + distill.distill_samples,
        ce_weight=distill.distill_ce_weight,
        lora_r=lora_r,
        base_in_scheme=arguments.lora.base_in_scheme,
        gather_dtype=getattr(torch, args.fsdp_gather_dtype) if backend.shards else torch.float32,
        smooths_labels=bool(args.label_smoothing_factor),
        compiled=bool(args.torch_compile),
        device=device,
        backend=backend,
    )
