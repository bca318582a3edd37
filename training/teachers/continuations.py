"""Samples of a teacher: text of its own, on which a student can learn from it without any data.

Each is drawn token by token from the teacher's distribution at temperature 1, to a fixed length. A text begins with the
teacher's first token alone (BOS) and does not stop at EOS: what follows is the next text. A conversation begins as the
chat template begins one for the user, whose words the teacher makes up, too (Magpie, arXiv:2406.08464); behind a token
that ends a turn the template opens the next one. Samples are drawn once and kept under a fingerprint of the teacher's
weights and the settings.
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

from . import turns
from .cache import wait_for
from .precision import needs_autocast
from .sample_keys import weights_digest
from .turns import Opening

logger = logging.getLogger(__name__)

SEED = 0  # of the draws; that of a run has no part in it, so runs of several seeds share what was sampled
TOKENS_AT_ONCE = 32_768  # in the key/value cache: 128 sequences of 256 tokens
ROWS_AT_ONCE = 256  # of FP32 logits and probabilities: 256 MB for a vocabulary of 128 K
_FILE = "tokens.bin"


def sample_continuations(
    teacher: PreTrainedModel, count: int, length: int, opening: Opening, training_args, folder: str | None
) -> Dataset:
    """`count` sequences of `length` tokens: columns `input_ids`, `labels`, `length`; all but the first are labelled.

    The first process of each machine samples, unless they are there; the others wait. All processes must call it.

    Args:
        teacher: unquantized; on the other processes its weights may be empty. It is where it was afterwards.
        opening: what each sequence begins with, whose tokens are not labelled, and what is put behind turns.
        folder: where they are kept; None: beside the caches of the data.

    Raises:
        UserError: the teacher has no key/value cache or no weights here, or machines sampled different tokens.
    """
    builds = training_args.local_process_index == 0
    if builds and any(parameter.is_meta for parameter in teacher.parameters()):
        raise UserError(no_weights(opening.name(count)))
    digest = [weights_digest(teacher) if builds else None]
    if training_args.world_size > 1:
        broadcast_object_list(digest)
    root = Path(folder) if folder else default_root().with_name("teachers")
    code = hashlib.blake2b(b"".join(Path(file).read_bytes() for file in (__file__, turns.__file__))).hexdigest()
    settings = {"count": count, "length": length, "opening": repr(opening), "seed": SEED, "at once": TOKENS_AT_ONCE}
    key = fingerprint({"continuations of": digest[0], "code": code, **settings})

    def build(partial: Path) -> None:
        tokens = _on_device(teacher, training_args, count, length, opening)
        (partial / _FILE).write_bytes(tokens.astype("<i4").tobytes())

    path = (build_once(root, key, build, "--distill_cache_dir") if builds else wait_for(root / key)) / _FILE
    content = path.read_bytes()
    if training_args.world_size > 1:
        _check_alike(hashlib.blake2b(content).hexdigest(), opening.name(count))
    logger.info("samples of the teacher (%s): %d of %d tokens, %s", opening.kind, count, length, path.parent)
    tokens = np.frombuffer(content, dtype="<i4").reshape(count, length)
    if opening.turns and builds:
        _check_turns(tokens, opening)
    labels = tokens.copy()
    labels[:, : len(opening.begin)] = IGNORE_INDEX
    return Dataset.from_dict({"input_ids": list(tokens), "labels": list(labels), "length": [length] * count})


def _check_turns(tokens: np.ndarray, opening: Opening) -> None:
    """Log how many turns the teacher has ended; a warning where most conversations have not even a question."""
    body = tokens[:, len(opening.begin) :]
    ended = np.isin(body, [turn[0] for turn in opening.turns]).sum(1)
    if (ended > 0).mean() < 0.5:
        logger.warning(
            "The teacher ended the user's turn in %d of %d conversations, so most have no answer: it may not know the "
            "chat template's end of a turn, or --distill_generic_length %d is short; consider teacher:%d",
            (ended > 0).sum(), len(tokens), tokens.shape[1], len(tokens),
        )  # fmt: skip
    else:
        logger.info("the teacher ended %.1f turns a conversation", ended.mean())


def no_weights(name: str) -> str:
    """Why samples (teacher:N, chat:N) are not drawn where one machine alone has read the weights."""
    return (
        f"--distill_generic {name} is sampled by the first process of each machine, and that of the first "
        "machine alone has weights; set fsdp_cpu_ram_efficient_loading: false in the accelerate configuration, give a "
        "FILE, or --distill_generic none"
    )


def _check_alike(digest: str, name: str) -> None:
    if len(set(gather_object([digest]))) > 1:
        raise UserError(
            f"--distill_generic {name}: machines sampled different tokens; give --distill_cache_dir a folder that all "
            "of them share, or give --distill_generic none"
        )


def _on_device(teacher: PreTrainedModel, training_args, count: int, length: int, opening: Opening) -> np.ndarray:
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
            return sample(teacher, count, length, opening)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--distill_generic {opening.name(count)} is sampled by the whole teacher on one device, and {device} has "
            f"too little memory for it ({str(error).splitlines()[0]}); give a FILE of text, or --distill_generic none"
        ) from None
    finally:
        teacher.to(home).train(was_training)
        if home.type != device.type:
            torch.cuda.empty_cache()


@torch.no_grad()
def sample(teacher: PreTrainedModel, count: int, length: int, opening: Opening, seed: int = SEED) -> np.ndarray:
    """Tokens int64 [count, length], drawn from the teacher's own distribution; a function of the arguments alone.

    Raises:
        UserError: the teacher keeps no keys and values, so each token would cost a whole sequence.
    """
    device, at_once = teacher.device, min(ROWS_AT_ONCE, max(1, TOKENS_AT_ONCE // length))
    generator = torch.Generator(device).manual_seed(seed)
    begin, sequences = torch.tensor(opening.begin, device=device), []
    with tqdm(total=count * (length - len(begin)), desc="sampling from the teacher", unit="token") as progress:
        for first in range(0, count, at_once):
            rows = min(at_once, count - first)
            tokens, past, given = [begin.expand(rows, -1)], None, opening.given(rows, device)
            for _ in range(length - len(begin)):
                output = teacher(input_ids=tokens[-1], past_key_values=past, use_cache=True)
                past = getattr(output, "past_key_values", None)
                if past is None:
                    raise UserError(
                        f"--distill_generic {opening.name(count)}: a {type(teacher).__name__} keeps no keys and values "
                        "to sample with; give a FILE of text, or --distill_generic none"
                    )
                probabilities = output.logits[:, -1].float().softmax(-1)
                tokens.append(given.instead_of(torch.multinomial(probabilities, 1, generator=generator)))
                progress.update(rows)
            sequences.append(torch.cat(tokens, 1).cpu())
    return torch.cat(sequences).numpy()
