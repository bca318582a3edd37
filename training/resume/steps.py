"""How many batches of training there are: a run of none is refused before it begins."""

from __future__ import annotations

from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from qat.errors import UserError


def check_steps(args: TrainingArguments, dataset: Dataset) -> None:
    """Refuse a training of zero steps: all incomplete batches are dropped, and no batch is complete on all processes.

    Raises:
        UserError: the rows are fewer than one batch of all processes; names rows, batch, processes and the remedy.
    """
    if not has_length(dataset):
        return  # a stream: FaultTolerantTrainer refuses it once it has yielded nothing
    rows, batch, processes = len(dataset), args.train_batch_size, args.world_size
    if rows // batch // processes > 0 or (rows > 0 and not args.dataloader_drop_last):
        return
    packed = " (packed: a smaller --model_max_length makes more)" if hasattr(dataset, "capacity") else ""
    remedy = f"--per_device_train_batch_size of at most {rows // processes}, " if rows >= processes else ""
    raise UserError(
        f"nothing would be trained: --dataset gives {rows} rows{packed}, fewer than the --per_device_train_batch_size "
        f"{batch} x {processes} {'process' if processes == 1 else 'processes'} of one batch; give {remedy}more data, "
        "or --dataloader_drop_last False"
    )


def check_trained(steps: int) -> None:
    """Refuse to call a training done that had no step.

    Raises:
        UserError: `steps` is 0: a stream has ended before its first batch.
    """
    if steps == 0:
        raise UserError(
            "nothing was trained: --dataset ended before the first batch was complete, so nothing is saved; give more "
            "data, a smaller --per_device_train_batch_size, or --dataloader_drop_last False"
        )
