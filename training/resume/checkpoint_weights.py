"""The weights of a checkpoint have the model's own names, and all of them are loaded again.

transformers saves some models under their published names: experts that it keeps fused are split into a matrix each.
`from_pretrained` joins them again. Trainer (5.23) resumes by `load_state_dict`, which does not: after a warning, it
would continue with the experts that the run began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError

_SHOWN = 3  # names in a message


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Let `model.save_pretrained` keep the names and shapes of the model inside."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def check_loaded(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """Refuse a checkpoint that has not given the model all of its weights, or that has others.

    Args:
        missing, unexpected: what `load_state_dict` returned. Of tied weights one is enough.

    Raises:
        UserError: names some of them.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    absent = set(missing) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
    for names in groups.values():
        if not names <= absent:
            absent -= names
    if faults := [*_listed("lacks", sorted(absent)), *_listed("has in place of them", sorted(unexpected))]:
        raise UserError(
            f"the checkpoint does not have the weights of this model: it {' and '.join(faults)}. An earlier version of "
            "this program wrote it, or another model; give another --output_dir, or --resume_from_checkpoint False"
        )


def _listed(verb: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{verb} {', '.join(names[:_SHOWN])}{more}"] if names else []
