"""Continuations sampled from a teacher: text of its own, on which a student can learn from it without any data.

Each begins with the teacher's first token alone (BOS) and is drawn token by token from the teacher's distribution at
temperature 1, to a fixed length; a sequence does not stop at EOS, so what follows is the next text. They are sampled
once and kept under a fingerprint of the teacher's weights and the settings.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from data.conversations.formatting import IGNORE_INDEX
from data.sets.cache import default_root, fingerprint
from qat.errors import UserError
from qat.files.build_once import build_once

from .cache import wait_for
from .precision import needs_autocast
from .sample_keys import weights_digest

logger = logging.getLogger(__name__)

SEED = 0  # of the draws; that of a run has no part in it, so runs of several seeds share what was sampled
TOKENS_AT_ONCE = 32_768  # in the key/value cache: 128 sequences of 256 tokens
ROWS_AT_ONCE = 256  # of FP32 logits and probabilities: 256 MB for a vocabulary of 128 K
_FILE = "tokens.bin"


def sample_continuations(
    teacher: PreTrainedModel, count: int, length: int, begin: int, training_args, folder: str | None
) -> Dataset:
    """`count` sequences of `length` tokens: columns `input_ids`, `labels`, `length`; all tokens but BOS are labelled.

    The first process of each machine samples, unless they are there; the others wait. All processes must call it.

    Args:
        teacher: unquantized; on the other processes its weights may be empty. It is where it was afterwards.
        begin: id of the token that each sequence begins with.
        folder: where they are kept; None: beside the caches of the data.

    Raises:
        UserError: the teacher has no key/value cache or no weights here, or machines sampled different tokens.
    """
    builds = training_args.local_process_index == 0
    if builds and any(parameter.is_meta for parameter in teacher.parameters()):
        raise UserError(no_weights(count))
    digest = [weights_digest(teacher) if builds else None]
    if training_args.world_size > 1:
        broadcast_object_list(digest)
    root = Path(folder) if folder else default_root().with_name("teachers")
    code = hashlib.blake2b(Path(__file__).read_bytes()).hexdigest()
    settings = {"count": count, "length": length, "begin": begin, "seed": SEED, "at once": TOKENS_AT_ONCE}
    key = fingerprint({"continuations of": digest[0], "code": code, **settings})

    def build(partial: Path) -> None:
        tokens = _on_device(teacher, training_args, count, length, begin)
        (partial / _FILE).write_bytes(tokens.astype("<i4").tobytes())

    path = (build_once(root, key, build, "--distill_cache_dir") if builds else wait_for(root / key)) / _FILE
    content = path.read_bytes()
    if training_args.world_size > 1:
        _check_alike(hashlib.blake2b(content).hexdigest())
    logger.info("continuations of the teacher: %d of %d tokens, %s", count, length, path.parent)
    tokens = np.frombuffer(content, dtype="<i4").reshape(count, length)
    labels = tokens.copy()
    labels[:, 0] = IGNORE_INDEX
    return Dataset.from_dict({"input_ids": list(tokens), "labels": list(labels), "length": [length] * count})


def no_weights(count: int) -> str:
    """Why `count` continuations are not sampled where one machine alone has read the weights."""
    return (
        f"--distill_generic teacher:{count} is sampled by the first process of each machine, and that of the first "
        "machine alone has weights; set fsdp_cpu_ram_efficient_loading: false in the accelerate configuration, give a "
        "FILE, or --distill_generic none"
    )


def _check_alike(digest: str) -> None:
    if len(set(gather_object([digest]))) > 1:
        raise UserError(
            "--distill_generic teacher:N: machines sampled different continuations; give --distill_cache_dir a folder "
            "that all of them share, or give --distill_generic none"
        )


def _on_device(teacher: PreTrainedModel, training_args, count: int, length: int, begin: int) -> np.ndarray:
    """Sample on the device of the run, and leave the teacher where and as it was.

    Raises:
        UserError: the teacher does not fit there.
    """
    home, was_training, device = teacher.device, teacher.training, training_args.device
    parameters_are_wide = next(teacher.parameters()).dtype == torch.float32
    wide = getattr(training_args, "bf16", False) and parameters_are_wide
    try:
        teacher.to(device).eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=wide or needs_autocast(teacher, None)):
            return sample(teacher, count, length, begin)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--distill_generic teacher:{count} is sampled by the whole teacher on one device, and {device} has too "
            f"little memory for it ({str(error).splitlines()[0]}); give a FILE of text, or --distill_generic none"
        ) from None
    finally:
        teacher.to(home).train(was_training)
        if home.type != device.type:
            torch.cuda.empty_cache()


@torch.no_grad()
def sample(teacher: PreTrainedModel, count: int, length: int, begin: int, seed: int = SEED) -> np.ndarray:
    """Tokens int64 [count, length], drawn from the teacher's own distribution; a function of the arguments alone.

    Raises:
        UserError: the teacher keeps no keys and values, so each token would cost a whole sequence.
    """
    device, at_once = teacher.device, min(ROWS_AT_ONCE, max(1, TOKENS_AT_ONCE // length))
    generator = torch.Generator(device).manual_seed(seed)
    sequences = []
    with tqdm(total=count * (length - 1), desc="sampling from the teacher", unit="token") as progress:
        for first in range(0, count, at_once):
            rows = min(at_once, count - first)
            tokens, past = [torch.full((rows, 1), begin, device=device)], None
            for _ in range(length - 1):
                output = teacher(input_ids=tokens[-1], past_key_values=past, use_cache=True)
                past = getattr(output, "past_key_values", None)
                if past is None:
                    raise UserError(
                        f"--distill_generic teacher:{count}: a {type(teacher).__name__} keeps no keys and values to "
                        "sample with; give a FILE of text, or --distill_generic none"
                    )
                probabilities = output.logits[:, -1].float().softmax(-1)
                tokens.append(torch.multinomial(probabilities, 1, generator=generator))
                progress.update(rows)
            sequences.append(torch.cat(tokens, 1).cpu())
    return torch.cat(sequences).numpy()
