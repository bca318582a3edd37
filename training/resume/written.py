"""Checkpoints and models that appear whole or not at all, however many processes write them and whenever one is killed.

A checkpoint is written by all processes into `.checkpoint-N.partial`, flushed to disk, listed in its manifest, and then
renamed. The final model shares its folder with the checkpoints, so its files are written into `.model.partial`, flushed
and renamed one by one: `config.json`, without which nothing loads the folder, is removed first and written last.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qat.checkpoints.folder import CONFIG_NAME, CheckpointFolder
from qat.checkpoints.skeleton import load_skeleton
from qat.errors import UserError
from qat.files.atomic import clear_leftovers, disk_full_reported, flush_path, flush_to_disk, partial_of, put_in_place
from qat.files.manifest import MANIFEST_NAME, names_in, write_manifest
from qat.files.sealing import Sealing
from qat.schemes.config import QAT_CONFIG_NAME

from ..backends.writers import Writers

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MODEL_PARTIAL = ".model.partial"
BASE_FOLDER = "base"  # in the folder of a run: the frozen weights of adapters, where they are not a published model's
# Files of another model, and of its tokenizer, which transformers would read beside this one.
_STALE = (
    "model*.safetensors", "model.safetensors.index.json", QAT_CONFIG_NAME, "adapter/adapter_*",
    "generation_config.json",
)  # fmt: skip
_STALE_WITH_TOKENIZER = (  # where a tokenizer is saved; without one, what a program has put there itself stays
    "chat_template.*", "additional_chat_templates/*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model",
)  # fmt: skip


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of `folder`, oldest (smallest N) first, complete or not."""
    if not Path(folder).is_dir():
        return []
    found = [p for p in Path(folder).iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The N of `checkpoint-N`; -1 for another name."""
    match = _CHECKPOINT.fullmatch(Path(checkpoint).name)
    return int(match[1]) if match else -1


class Content:
    """A checkpoint that is being written.

    Attributes:
        folder: what takes the place of the output folder meanwhile; the checkpoint is its subfolder.
    """

    def __init__(self, folder: Path, sealing: Sealing, threads: ThreadPoolExecutor) -> None:
        self.folder, self._sealing, self._threads = folder, sealing, threads
        self._beside: list[Future] = []

    def beside(self, write: Callable[..., object], *args) -> None:
        """Call `write(*args)` on a thread; what it raises is raised when the checkpoint is finished."""
        self._beside.append(self._threads.submit(write, *args))

    def complete(self, pattern: str) -> None:
        """No file that matches `pattern` is written to any more: its checksum and its flush may begin."""
        self._sealing.begin(path.name for path in self._sealing.folder.glob(pattern))

    def wait(self) -> None:
        """Wait for what was begun by `beside`."""
        for each in self._beside:
            each.result()


@contextmanager
def checkpoint_written_whole(target: Path, writers: Writers) -> Iterator[Content]:
    """Yield a folder in which all processes fill a subfolder of `target`'s name; it becomes `target` on success.

    Raises:
        DiskFullError: no space is left. OSError: the machines do not share the folder. Nothing is left then.
    """
    partial = partial_of(target)
    content = partial / target.name
    try:
        with disk_full_reported(target, "--output_dir"):
            if writers.leads:
                clear_leftovers(target)
                content.mkdir(parents=True)
            writers.wait()
            if not content.is_dir():
                raise OSError(
                    f"{content} was made by the main process and is not seen by process {writers.index}: --output_dir "
                    "must lie on storage that all machines share, or give --save_on_each_node True"
                )
            with Sealing(content, writers.index, writers.count) as sealing, ThreadPoolExecutor(1) as threads:
                files = Content(partial, sealing, threads)
                yield files
                files.wait()
                writers.wait()
                parts = writers.gather(sealing.entries(names_in(content)[writers.index :: writers.count]))
            if writers.leads:
                write_manifest(content, {name: entry for part in parts for name, entry in part.items()})
                _flush_names(content)
                put_in_place(content, target)
                partial.rmdir()
            writers.wait()
    except BaseException:
        if writers.leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush_names(folder: Path) -> None:
    """Flush what no process has flushed yet: the manifest and the folders."""
    flush_path(folder / MANIFEST_NAME)
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_path(path)
    flush_path(folder)


def delete_older_checkpoints(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints of `folder` beyond `limit`, never one of `keep`.

    A checkpoint is renamed before it is deleted, so a partly deleted one is never taken for complete. One that cannot
    be deleted is logged; the newer ones are complete all the same.

    Args:
        limit: None, 0 or a negative number: no limit, as in transformers.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = checkpoints_in(folder)
    spare = [path for path in checkpoints if path not in keep]
    surplus = len(checkpoints) - max(limit, len(keep))
    for path in spare[: max(surplus, 0)]:
        doomed = path.with_name(f".{path.name}.deleted")
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("%s stays beyond --save_total_limit %d: it cannot be deleted (%s)", path, limit, error)
            continue
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def model_written_whole(folder: str | Path, leads: bool) -> Iterator[Path]:
    """Yield an empty folder whose files replace the model in `folder` on success; on error that one stays.

    Args:
        leads: whether this process writes; the others get the same path and do not write there.

    Raises:
        DiskFullError: no space is left.
    """
    folder = Path(folder)
    partial = folder / MODEL_PARTIAL
    if not leads:
        yield partial
        return
    try:
        with disk_full_reported(folder, "--output_dir"):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
            flush_to_disk(partial)
            _install(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_saved_model(folder: Path) -> None:
    """Compare the names and shapes of the weights in `folder` with those of the model that transformers makes of it.

    transformers saves some models under other names than it loads, and tensors can be lost on the way. No weight is
    read. A folder without config.json holds no model of transformers, and is not looked at.

    Raises:
        UserError: something is missing, of another shape, or has no place in the model.
    """
    if not (folder / CONFIG_NAME).is_file():
        return
    try:
        checkpoint = CheckpointFolder.open(folder)
        # Code beside the weights is that of the model in memory, which has run already.
        load_skeleton(checkpoint, trust_remote_code="auto_map" in checkpoint.config)
    except UserError as error:
        raise UserError(
            f"the model was not saved, since it could not be loaded again: {error}. transformers loses weights of this "
            "model when it saves them; the checkpoints that the run has written keep what was trained"
        ) from error


def _install(partial: Path, folder: Path) -> None:
    new = {path.name for path in partial.iterdir()}
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    has_tokenizer = any(name.startswith("tokenizer") for name in new)
    for pattern in (*_STALE, *(_STALE_WITH_TOKENIZER if has_tokenizer else ())):
        for path in folder.glob(pattern):
            if path.relative_to(folder).parts[0] not in new and path.is_file():
                path.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG_NAME):
        if name == CONFIG_NAME:
            flush_path(folder)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (partial / name).replace(folder / name)
    partial.rmdir()
    flush_path(folder)
