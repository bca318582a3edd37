"""Operators: functions of tensors that torch.compile, FSDP and dispatch modes see as one step each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors, registered with `torch.library` under `mx_qat::NAME`.

    Called with plain tensors where no gradient is wanted, as inside of autograd functions, it is the function itself.
    Through the dispatcher a call takes a processor about 0.1 ms, and more in autograd's thread, which is what a GPU
    needs for the work. What traces, shards, transforms or differentiates goes through the operator, as do subclasses of
    tensors and tensors without values.
    """

    def __init__(self, name: str, function: Callable) -> None:
        self.function = function
        self.operator = torch.library.custom_op(f"mx_qat::{name}", function, mutates_args=())
        self.register_fake, self.register_autograd = self.operator.register_fake, self.operator.register_autograd
        functools.update_wrapper(self, function)

    def __call__(self, *args, **kwargs):
        is_watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_intercepted()
        if is_watched or kwargs or not _are_plain(args):
            return self.operator(*args, **kwargs)
        return self.function(*args)


def _is_intercepted() -> bool:
    """Whether a dispatch mode (fake tensors, make_fx, counters) or a transform of torch.func sees every operator."""
    return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


def _are_plain(arguments: Sequence[Any]) -> bool:
    """Whether all tensors among arguments and in lists have values and are of no subclass."""
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN:
            if argument.is_meta:
                return False
        elif kind is list:
            if not _are_plain(argument):
                return False
        elif isinstance(argument, torch.Tensor):
            return False
    return True


def registered(name: str) -> Callable[[Callable], Operator]:
    """Decorator: the function as the operator `mx_qat::NAME`."""
    return lambda function: Operator(name, function)
