"""Packing: several whole samples in one row, each with positions of its own and no attention to the others.

A row is filled by best fit, longest samples first, so nothing is cut and little is padded. That samples do not see each
other rests on the model: given `position_ids` that start again at 0 and no attention mask, transformers builds a
block-diagonal mask for eager, sdpa and flex_attention, and gives flash attention the borders (one row per batch there).
Models that mix tokens in another way (state spaces, convolutions, remote code with its own masks) would leak, so
`check_packing` tries the model itself.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import nn

from qat.errors import UserError

from ..conversations.formatting import IGNORE_INDEX

_MASKED = ("eager", "sdpa", "flex_attention")  # one block-diagonal mask over each row
_LEAK, _SHIFT = 1e-4, 0.1  # of the logits' size: float noise is below, a visible neighbour or a wrong position above


def plan_packing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Plan which samples share a row: indices into `lengths`, rows in the order in which they were begun.

    Best fit decreasing: each sample goes to the fullest row that still holds it. Open rows are kept by free space, and
    the bits of one integer say which spaces occur, so the tightest is found at once.

    Raises:
        UserError: a sample longer than `capacity` tokens.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise UserError(f"sample {index} has {length} tokens, more than a row of {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        by_space.setdefault(space - length, []).append(row)
        spaces |= 1 << (space - length)
    return rows


def pack(samples: list[dict]) -> dict[str, list[int]]:
    """One row: `input_ids`, `labels` and `position_ids`, which start again at 0 with each sample."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for sample in samples:
        row["input_ids"] += sample["input_ids"]
        row["labels"] += [IGNORE_INDEX, *sample["labels"][1:]]  # the sample before does not predict this one
        row["position_ids"] += range(len(sample["input_ids"]))
    return row


class PackedDataset(torch.utils.data.Dataset):
    """Rows of whole samples, put together when they are asked for.

    Args:
        samples: encoded samples, with a column `length`.
        capacity: tokens of a row.
    """

    def __init__(self, samples: Dataset, capacity: int) -> None:
        self.samples, self.capacity = samples, capacity
        self.rows = plan_packing(samples.data.column("length").to_pylist(), capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        part = self.samples[self.rows[index]]
        return pack([{"input_ids": a, "labels": b} for a, b in zip(part["input_ids"], part["labels"], strict=True)])


def needs_one_row(model: nn.Module) -> bool:
    """Whether the model's attention takes packed samples only as a batch of one row: flash attention does."""
    return "flash" in (model.config._attn_implementation or "")


def runs_flash_attention(model: nn.Module) -> bool:
    """Whether flash attention can compute with the weights as they are: in 16 bits on a GPU."""
    weights = next(model.parameters())
    return weights.device.type == "cuda" and weights.dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Try whether samples packed into one row are independent in `model`; returns if they are.

    Two rows that differ in their first sample only must give the same logits for their second sample, and the logits
    that it has alone. Flash attention computes in 16 bits on a GPU only; elsewhere, and for a model in FP32, sdpa is
    tried in its place, since everything but the attention kernel is the same.

    Raises:
        UserError: they are not, or the attention implementation is not known to keep them apart.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing to try; the process that has the weights tries them
    name = model.config._attn_implementation
    if getattr(model.config, "use_cache", False):
        raise UserError(
            "--packing True: with model.config.use_cache, transformers builds no mask between packed samples; "
            "set it to False"
        )
    if name is not None and name not in _MASKED and "flash" not in name:
        raise UserError(
            f"--packing True: attention implementation {name!r} is not known to keep packed samples apart; "
            f"set --packing False, or load the model with one of {', '.join(_MASKED)}, flash_attention_2"
        )
    device = next(model.parameters()).device
    stands_in = needs_one_row(model) and not runs_flash_attention(model)
    was_training = model.training
    model.eval()
    try:
        if stands_in:
            model.set_attn_implementation("sdpa")
        leak, shift = _measure(model, device)
    except (TypeError, NotImplementedError) as error:
        raise UserError(
            f"--packing True: {type(model).__name__} takes no position_ids ({error}); use --packing False"
        ) from error
    finally:
        if stands_in:
            model.set_attn_implementation(name)
        model.train(was_training)
    if leak > _LEAK or shift > _SHIFT:
        leaks = leak > _LEAK
        what = "a packed sample changes with its neighbour" if leaks else "positions do not restart at each sample"
        raise UserError(
            f"--packing True: in {type(model).__name__} with {name} attention {what} (logits differ by "
            f"{max(leak, shift):.1e} of their size), so it would not train as it does unpacked; use --packing False"
        )


def _measure(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """Relative differences of the second sample's logits: with another first sample, and alone."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(24, device=device) * 7 % vocabulary
    first, other, second = tokens[:8], tokens[8:16], tokens[16:]
    positions = torch.arange(8, device=device).repeat(2)[None]

    def logits(row: torch.Tensor) -> torch.Tensor:
        return model(input_ids=row[None], position_ids=positions).logits[0, 8:].float()

    packed = logits(torch.cat([first, second]))
    neighbour = logits(torch.cat([other, second]))
    alone = model(input_ids=second[None], attention_mask=torch.ones_like(second)[None]).logits[0].float()
    size = packed.norm()
    return float((packed - neighbour).norm() / size), float((packed - alone).norm() / size)
