"""Names of parameters and modules, whatever a model has been wrapped in since."""

from __future__ import annotations

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def original_name(name: str) -> str:
    """The name that a parameter or module had before FSDP, activation checkpointing and torch.compile wrapped it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
