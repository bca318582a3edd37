"""own_optimizer: the optimizer of a run where it is none of Trainer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .muon import MuonFactory
from .stochastic_adamw import StochasticAdamW

MUON = "muon"


def own_optimizer(args, model: nn.Module, decays: list[str]) -> tuple[Any, dict[str, Any]] | None:
    """Class (or factory) and arguments, as Trainer's `optimizer_cls_and_kwargs`; None where Trainer has it.

    Args:
        args: TrainingArguments, those of transformers too.
        decays: names of the parameters of `model` that have weight decay.
    """
    shared = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == MUON:
        return MuonFactory, {
            **shared,
            **_read(args.optim_args),
            "decays": set(decays),
            "weight_decay": args.weight_decay,
        }
    if getattr(args, "master_dtype", "float32") == "bfloat16":
        return StochasticAdamW, {**shared, "moment_dtype": getattr(torch, args.moment_dtype), "seed": args.seed}
    return None


def _read(optim_args: str | None) -> dict[str, float | int | bool]:
    """ "momentum=0.9,nesterov=false" -> {"momentum": 0.9, "nesterov": False}."""
    pairs = [pair.split("=") for pair in (optim_args or "").replace(" ", "").split(",") if pair]
    return {name: _number(value) for name, value in pairs}


def _number(text: str) -> float | int | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return float(text) if any(sign in text.lower() for sign in ".e") else int(text)
