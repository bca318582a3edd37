"""A teacher's distributions, computed once and kept as a few numbers for each token: training without the teacher.

What is kept is a sample of each distribution (sampled_tokens.py).

Entries are found by content: the tokens and labels of a sample are its key. So neither the order of samples nor
packing, padding or resuming matters, and an entry cannot belong to other data. The folder's name is a fingerprint of
the teacher's weights, the settings and all keys.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import ConcatDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from data.conversations.formatting import IGNORE_INDEX
from data.sets.cache import default_root, fingerprint
from qat.errors import UserError
from qat.files.build_once import build_once

from ..arguments.distillation import CacheSettings
from ..losses.distillation import HiddenRows, SampledRows, chunks
from .frozen import FrozenTeacher
from .sample_keys import Sample, samples_of, weights_digest
from .sampled_tokens import as_rows, columns, sample_rows

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 8192  # padded tokens in a forward of the teacher
PREFIX = "teacher_"  # of the columns that the collator adds to a batch


# ---- Building ----


def build_cache(
    root: Path, make_teacher: Callable | None, digest: str, dataset, settings: CacheSettings, what: str
) -> Path:
    """The folder with the teacher's distributions of all samples of `dataset`; built unless it exists.

    Args:
        root: where caches lie.
        make_teacher: makes something whose `rows` gives HiddenRows (a FrozenTeacher), called only if the cache must be
            built; None in a process that waits for another one to build it.
        digest: `weights_digest` of the teacher's model.
        what: the name of the data set in messages.

    Raises:
        UserError: the data set cannot be read ahead, or `root` cannot be written.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError("--distill_teacher cache needs a data set that can be read ahead; use --streaming False")
    samples = {}
    for index in tqdm(range(len(dataset)), desc=f"keys of {what}", disable=len(dataset) < 10_000):
        samples.update((sample.key, sample) for sample in samples_of(dataset[index]))
    files = [Path(__file__).with_name(name) for name in ("cache.py", "sample_keys.py", "sampled_tokens.py")]
    code = hashlib.blake2b(b"".join(path.read_bytes() for path in files)).hexdigest()
    keys = hashlib.blake2b(b"".join(sorted(samples))).hexdigest()
    parts = {"teacher": digest, "keys": keys, "teacher_cache": code, **asdict(settings)}
    key = fingerprint(parts)
    if make_teacher is None:
        folder = wait_for(root / key)
    else:
        build = functools.partial(_build, make_teacher=make_teacher, samples=samples, settings=settings, what=what)
        folder = build_once(root, key, build, "--distill_cache_dir")
    tokens = json.loads((folder / "about.json").read_text())["tokens"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    logger.info("teacher's distributions of %s: %d tokens, %.1f MB, %s", what, tokens, size / 1e6, folder)
    return folder


def wait_for(folder: Path) -> Path:
    """`folder`, once another process has built it; if that one fails, the launcher ends this one too."""
    while not folder.is_dir():
        time.sleep(1)
    return folder


def _build(folder: Path, make_teacher: Callable, samples: dict[bytes, Sample], settings: CacheSettings, what: str):
    teacher, generator = make_teacher(), None
    files = {name: (folder / f"{name}.bin").open("wb") for name in columns(settings, 0)}
    keys, counts, vocabulary = [], [], 0
    progress = tqdm(total=len(samples), desc=f"teacher on {what}", unit="sample")
    for batch in _batches(sorted(samples.values(), key=lambda s: len(s.ids))):
        rows: HiddenRows = teacher.rows(_collate(batch, teacher.device))
        for part in chunks(len(rows.hidden)):
            with torch.no_grad():
                logits = rows.head(rows.hidden[part])
            vocabulary = logits.shape[-1]
            if generator is None:
                generator = torch.Generator(logits.device).manual_seed(settings.seed)
            sampled = sample_rows(logits, settings, generator)
            for name, dtype in columns(settings, vocabulary).items():
                files[name].write(sampled[name].cpu().numpy().astype(dtype[0]).tobytes())
        keys += [sample.key for sample in batch]
        counts += [sample.count for sample in batch]
        progress.update(len(batch))
    progress.close()
    for file in files.values():
        file.close()
    (folder / "keys.bin").write_bytes(b"".join(keys))
    (folder / "counts.bin").write_bytes(np.array(counts, dtype="<i8").tobytes())
    about = {"vocabulary": vocabulary, "tokens": sum(counts), "settings": asdict(settings)}
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Samples of about the same length, TOKENS_AT_ONCE padded tokens together."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and len(sample.ids) * (len(batch) + 1) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _collate(samples: list[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(sample.ids) for sample in samples)
    ids, labels, mask = (torch.full((len(samples), longest), value) for value in (0, IGNORE_INDEX, 0))
    for row, sample in enumerate(samples):
        tokens, end = torch.from_numpy(sample.ids.astype(np.int64)), len(sample.ids)
        ids[row, :end], mask[row, :end] = tokens, 1
        labels[row, :end] = torch.where(torch.from_numpy(sample.labelled), tokens, IGNORE_INDEX)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


# ---- Reading ----


class TeacherCache:
    """A built folder, mapped into memory when it is first asked (so it travels to the workers of a data loader)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._maps = Path(folder), None

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "_maps": None}

    def rows(self, samples: Iterable[Sample]) -> SampledRows:
        """The teacher's distributions of all labelled tokens of `samples`, in order.

        Raises:
            UserError: a sample is not in the cache.
        """
        if self._maps is None:
            self._open()
        tokens: list[np.ndarray] = []
        for sample in samples:
            found = self._index.get(sample.key)
            if found is None:
                raise UserError(
                    f"a sample of {len(sample.ids)} tokens is not in the teacher's cache {self.folder}; the data of "
                    "this run must be the data that the cache was built from"
                )
            tokens.append(np.arange(self._offsets[found], self._offsets[found + 1]))
        where = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int64)
        part = {name: torch.from_numpy(np.ascontiguousarray(column[where])) for name, column in self._maps.items()}
        return as_rows(part | {"entropy": part["entropy"].squeeze(-1)})

    def _open(self) -> None:
        about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        keys, counts = (self.folder / "keys.bin").read_bytes(), np.fromfile(self.folder / "counts.bin", dtype="<i8")
        self._index = {keys[i * 16 : i * 16 + 16]: i for i in range(len(counts))}
        self._offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        kept = columns(CacheSettings(**about["settings"]), about["vocabulary"])
        self._maps = {}
        for name, (dtype, width) in kept.items():
            shape = (about["tokens"], width)
            path = self.folder / f"{name}.bin"
            self._maps[name] = (
                np.memmap(path, dtype, "r", shape=shape) if width and shape[0] else np.empty(shape, dtype)
            )


class CachedTeacher:
    """A teacher that is not loaded: collators add its cached distributions to each batch.

    Args:
        folders: of `build_cache`, by "train" and "eval", where there are such sets.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.caches = {name: TeacherCache(folder) for name, folder in folders.items()}

    def collate(self, collator: Callable, which: str) -> Callable:
        """See `Teacher.collate`: adds the cached columns to batches."""
        return _CachedCollator(collator, self.caches[which]) if which in self.caches else collator

    def check(self, trains: bool) -> None:
        """See `Teacher.check`: what is kept does not change."""

    def rows(self, inputs: dict[str, torch.Tensor], student: nn.Module | None = None) -> SampledRows:
        """See `Teacher.rows`: removes the cached columns from a batch."""
        return SampledRows(**{name: inputs.pop(PREFIX + name) for name in ("ids", "weights", "entropy")})


@dataclass
class _CachedCollator:
    collate: Callable
    cache: TeacherCache

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(samples)
        names = [name for name in ("input_ids", "labels", "position_ids") if name in batch]
        rows = ({name: batch[name][i].numpy() for name in names} for i in range(len(batch["labels"])))
        kept = self.cache.rows(sample for row in rows for sample in samples_of(row))
        return {**batch, **{PREFIX + name: value for name, value in vars(kept).items()}}


# ---- Making ----


def make_cached_teacher(
    model: PreTrainedModel, training_args, data_module: dict, settings: CacheSettings, folder: str | None
):
    """The CachedTeacher of `model` for the sets of a data module, built by one process of each machine.

    The evaluation set is cached at temperature 1, at which its divergence is reported. `model` is not needed later.

    Args:
        folder: where caches are kept; None: beside those of the data.
    """
    root = Path(folder) if folder else default_root().with_name("teachers")
    builds = training_args.local_process_index == 0
    if builds and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "--distill_teacher cache is built by the first process of each machine, which has no weights here; set "
            "fsdp_cpu_ram_efficient_loading: false in the accelerate configuration, or choose --distill_teacher copy"
        )
    digest = [weights_digest(model) if builds else None]
    if training_args.world_size > 1:
        broadcast_object_list(digest)  # under FSDP the other processes have no weights to tell it from
    make_teacher = functools.cache(lambda: FrozenTeacher(model, training_args.device)) if builds else None
    folders = {}
    for which, temperature in (("train", settings.temperature), ("eval", 1.0)):
        dataset, own = data_module[f"{which}_dataset"], dataclasses.replace(settings, temperature=temperature)
        if which == "eval" and (generic := data_module.get("generic_eval_dataset")) is not None:
            dataset = generic if dataset is None else ConcatDataset([dataset, generic])
        if dataset is None:  # nothing is trained, or nothing evaluated
            continue
        dataset = getattr(dataset, "everything", dataset)  # an epoch of a MixedDataset may read a part of its rows
        folders[which] = build_cache(root, make_teacher, digest[0], dataset, own, f"the {which} set")
    return CachedTeacher(folders)
