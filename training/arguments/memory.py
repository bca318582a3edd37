"""Checks of the settings with which a full training needs less memory; docs/memory.md explains them."""

from __future__ import annotations

import os

from qat.errors import UserError

from .option_conditions import plain

DTYPES = ("float32", "bfloat16")
ADAMW = ("adamw_torch", "adamw_torch_fused")
STEPS_ALONE = (*ADAMW, "adafactor", "adagrad", "rmsprop", "sgd", "muon")  # parameter by parameter, as together


def check_memory(args) -> None:
    """Refuse settings of memory that exclude each other.

    Raises:
        UserError: as described.
    """
    if args.master_dtype == "bfloat16":
        _check_bfloat16(args)
    elif args.moment_dtype != "bfloat16":
        raise UserError(
            f"--moment_dtype {args.moment_dtype} has no effect with --master_dtype {args.master_dtype}: moments of "
            "FP32 masters are FP32, or what --optim makes of them; leave it out, or give --master_dtype bfloat16"
        )
    if args.optimizer_in_backward:
        _check_in_backward(args)


def _check_bfloat16(args) -> None:
    if (name := plain(args.optim)) not in ADAMW:
        raise UserError(
            f"--optim {name} with --master_dtype bfloat16: it rounds weights to nearest, and updates smaller than "
            f"half a step of BF16 would vanish; give --optim {ADAMW[1]}, which rounds stochastically then, or "
            "--master_dtype float32"
        )
    if not args.bf16:
        given = "fp16 True" if args.fp16 else "bf16 False"
        raise UserError(
            f"--{given} with --master_dtype bfloat16: weights and what layers hand on are BF16 then, so the run would "
            f"not compute in {'FP16' if args.fp16 else 'FP32'}; give --bf16 True, or --master_dtype float32"
        )
    if fsdp_version() == 1:
        raise UserError(
            "--master_dtype bfloat16 under FSDP1: accelerate makes FP32 masters of the BF16 parameters that it shards, "
            "so no memory would be saved; start with accelerate_config/fsdp2.yaml, or give --master_dtype float32"
        )


def _check_in_backward(args) -> None:
    if (steps := args.gradient_accumulation_steps) > 1:
        raise UserError(
            f"--gradient_accumulation_steps {steps} with --optimizer_in_backward True: a gradient is applied as soon "
            "as one batch has computed it, so nothing accumulates; give --gradient_accumulation_steps 1 and a larger "
            "--per_device_train_batch_size, or leave --optimizer_in_backward out"
        )
    if args.max_grad_norm:
        raise UserError(
            f"--max_grad_norm {args.max_grad_norm:g} with --optimizer_in_backward True: the norm of the whole gradient "
            "is known only after the first gradients have been applied; give --max_grad_norm 0 (no clipping), or leave "
            "--optimizer_in_backward out"
        )
    if args.max_nan_steps:
        raise UserError(
            f"--max_nan_steps {args.max_nan_steps} with --optimizer_in_backward True: a step with a non-finite "
            "gradient is applied in part before it is seen, so it cannot be left out; give --max_nan_steps 0, which "
            "ends the run there, or leave --optimizer_in_backward out"
        )
    if args.fp16:
        raise UserError(
            "--fp16 True with --optimizer_in_backward True: the loss scaler looks for overflows in all gradients "
            "before a step; give --bf16 True, or leave --optimizer_in_backward out"
        )
    if args.torch_compile or args.torch_compile_backend or args.torch_compile_mode:
        raise UserError(
            "--torch_compile True with --optimizer_in_backward True: a compiled backward pass returns the gradients of "
            "all layers together, so none would be freed early; leave one of the two out"
        )
    if (name := plain(args.optim)) not in STEPS_ALONE:
        raise UserError(
            f"--optim {name} with --optimizer_in_backward True: whether it updates parameters one by one as it does "
            f"together has not been tested; choose one of {', '.join(STEPS_ALONE)}"
        )
    if (version := fsdp_version()) == 1 or (version == 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError(
            f"--optimizer_in_backward True under {'FSDP1' if version else 'DDP'}: a gradient would be applied before "
            "it is reduced over processes, whose weights would then differ; start one process, or with "
            "accelerate_config/fsdp2.yaml"
        )


def fsdp_version() -> int:
    """1 or 2, as `accelerate launch` asks for; 0 without FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return 0
    return int(os.environ.get("FSDP_VERSION", "1"))
