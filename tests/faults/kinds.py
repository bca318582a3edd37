"""Kinds of faults: each injects one into a job, says so, continues the job, and raises `Lost` if anything was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import Run

from qat.errors import FAULT_STATUS, STATUS
from qat.processes import status_of

from .injected import (
    AfterSeconds,
    AtEvaluation,
    AtOperation,
    AtProcess,
    AtStep,
    CountOperations,
    FileSizeLimit,
    NanLoss,
    Unprivileged,
)
from .runs import STEPS, Job, difference

EVALUATED = (
    "--eval_strategy", "steps", "--eval_steps", "3", "--per_device_eval_batch_size", "1", "--metric_for_best_model",
    "loss",
)  # fmt: skip
TRANSFORMED = (
    "--packing", "True", "--model_max_length", "64", "--smooth_alpha", "auto", "--input_transform", "hadamard",
)  # fmt: skip
EVALUATED_BATCHES = 4 * 6  # at steps 3, 6, 8, and of the final model
VARIANTS = {
    "BF16": (),
    "MXFP4": ("--quant_scheme", "MXFP4"),
    "MXFP4, packed rows, transformed inputs": ("--quant_scheme", "MXFP4", *TRANSFORMED),
    "MXFP8, distilled": ("--quant_scheme", "MXFP8", "--distill", "True"),
    "BF16, grouped by length": ("--group_by_length", "True"),
    "MXFP4, cached teacher": ("--quant_scheme", "MXFP4", "--distill", "True", "--distill_teacher", "cache"),
    "MXFP8, exported": ("--quant_scheme", "MXFP8", "--export_format", "compressed-tensors"),
    "MXFP4, evaluated": ("--quant_scheme", "MXFP4", *EVALUATED),
    "BF16, best loaded": (*EVALUATED, "--load_best_model_at_end", "True", "--save_steps", "3"),
    "MXFP4, two processes": ("--quant_scheme", "MXFP4"),
    "MXFP4, evaluated, two processes": ("--quant_scheme", "MXFP4", *EVALUATED),
}
CACHED, EXPORTED = ("MXFP4, cached teacher",), ("MXFP8, exported",)
ONE_EVALUATED = ("MXFP4, evaluated", "BF16, best loaded")
TWO, TWO_EVALUATED = ("MXFP4, two processes",), ("MXFP4, evaluated, two processes",)
ONE = tuple(name for name in VARIANTS if name not in (*TWO, *TWO_EVALUATED, *EXPORTED))


class Lost(Exception):
    """A run did not end as it should, or not like the uninterrupted one."""


@dataclass
class Reference:
    """An uninterrupted run.

    Attributes:
        operations: on files in its output folder.
        seconds: of `main`.
    """

    whole: Job
    operations: int
    seconds: float

    @property
    def checkpoint_kib(self) -> float:
        """Size of one checkpoint."""
        return sum(p.stat().st_size for p in self.whole.checkpoints[-1].rglob("*")) / 1024

    @classmethod
    def make(cls, workspace: Path, variant: str) -> Reference:
        """Run it."""
        name = f"whole-{list(VARIANTS).index(variant)}"
        job = Job(workspace, name, VARIANTS[variant], 2 if variant in (*TWO, *TWO_EVALUATED) else 1)
        result = workspace / f"{name}.count"
        run = job.start(CountOperations(f"/{name}", str(result)))
        statuses = run.wait()
        assert not any(statuses), run.text()
        operations, seconds = result.read_text().split()
        return cls(job, int(operations), float(seconds))

    def job(self, name: str) -> Job:
        """The same command line, to another folder."""
        return Job(self.whole.workspace, name, self.whole.flags, self.whole.count)

    def check(self, job: Job) -> None:
        """Raise Lost unless `job` has come to the same end."""
        if (what := difference(self.whole.output, job.output)) is not None:
            raise Lost(f"the continued run differs in {what}")


@dataclass(frozen=True)
class Kind:
    """A kind of fault: `inject(job, reference, draw)`, for some variants of a run."""

    name: str
    inject: Callable[[Job, Reference, random.Random], None]
    variants: tuple[str, ...] = ONE


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _expect(condition: bool, what: str, text: str = "") -> None:
    if not condition:
        raise Lost(f"{what}\n{text[-3000:]}" if text else what)


def kill_any_time(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL at any time of a run."""
    seconds = draw.uniform(0.05, reference.seconds)
    _say(f"SIGKILL after {seconds:.2f} of {reference.seconds:.2f} s")
    job.start(AfterSeconds(seconds)).wait()
    job.finish()
    reference.check(job)


def kill_in_step(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL in the middle of a training step."""
    batch, delay = draw.randint(1, 2 * STEPS - 1), draw.uniform(0, 0.03)
    _say(f"SIGKILL {1000 * delay:.0f} ms into batch {batch}")
    statuses = job.start(AtStep(batch, delay=delay)).wait()
    _expect(statuses == [-signal.SIGKILL], f"exit statuses {statuses}")
    job.finish()
    reference.check(job)


def kill_at_file(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL at or soon after an operation on a file of the output folder: checkpoints, rotation, the final model."""
    number, delay = draw.randint(1, reference.operations), draw.choice((0.0, draw.uniform(0, 0.02)))
    _say(f"SIGKILL {1000 * delay:.0f} ms after file operation {number} of {reference.operations}")
    job.start(AtOperation(f"/{job.name}", number, delay)).wait()
    job.finish()
    reference.check(job)


def kill_in_final_save(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL while the final model is written and put in place."""
    number = draw.randint(1, 26)
    _say(f"SIGKILL at file operation {number} of the final model")
    job.start(AtOperation(f"/{job.name}/.model.partial", number)).wait()
    loadable = (job.output / "config.json").is_file()
    _expect(not loadable or (job.output / "model.safetensors").is_file(), "half of the final model can be loaded")
    job.finish()
    reference.check(job)


def end_in_data_cache(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL or SIGTERM while two processes tokenize the data."""
    cache = job.workspace / f"cache-{job.name}"
    job.flags = (*job.flags, "--data_cache_dir", str(cache), "--preprocessing_num_workers", "2")
    number, signum = draw.randint(1, 12), draw.choice((signal.SIGKILL, signal.SIGTERM))
    _say(f"{signum.name} at file operation {number} of the data cache")
    _end_in_cache(job, cache, AtOperation(str(cache), number, signum=signum))
    reference.check(job)


def end_in_teacher_cache(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL or SIGTERM while the teacher's distributions are computed."""
    cache = job.workspace / f"teachers-{job.name}"
    job.flags = (*job.flags, "--distill_cache_dir", str(cache))
    number, signum = draw.randint(1, 24), draw.choice((signal.SIGKILL, signal.SIGTERM))
    _say(f"{signum.name} at file operation {number} of the teacher's cache")
    _end_in_cache(job, cache, AtOperation(str(cache), number, signum=signum))
    reference.check(job)


def _end_in_cache(job: Job, cache: Path, fault: AtOperation) -> None:
    run = job.start(fault)
    statuses = run.wait()
    _expect(statuses == [_expected(fault.signum)], f"exit statuses {statuses}", run.text())
    _expect_no_process(run)
    if fault.signum == signal.SIGTERM:
        _expect(not list(cache.glob("*partial*")), "SIGTERM left a part of the cache")
    job.finish()
    _expect(not list(cache.glob("*partial*")), "a part of the cache was left")


def _expected(signum: int) -> int:
    """The exit status of a process after a signal."""
    return -signum if signum == signal.SIGKILL else status_of(signum)


def _expect_no_process(run: Run, seconds: float = 10) -> None:
    """No process is left that writes to the log of a run that has ended."""
    deadline = time.monotonic() + seconds
    while holders := [fd for fd in Path("/proc").glob("[0-9]*/fd/1") if _is_open(fd, run.log)]:
        _expect(time.monotonic() < deadline, f"processes outlive the run: {holders}")
        time.sleep(0.1)


def _is_open(descriptor: Path, path: Path) -> bool:
    try:
        return descriptor.readlink() == path
    except OSError:
        return False  # it has ended meanwhile


def end_in_export(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL or SIGTERM while the model is packed, or while fresh processes prove it."""
    signum = draw.choice((signal.SIGKILL, signal.SIGTERM))
    if draw.random() < 0.5:
        number = draw.randint(1, 12)
        _say(f"{signum.name} at file operation {number} of the packed model")
        fault = AtOperation(f"/{job.name}/.MXFP8.partial", number, signum=signum)
    else:
        number, delay = draw.randint(1, 2), draw.uniform(0, 6)
        _say(f"{signum.name} {delay:.1f} s into process {number} of the proof")
        fault = AtProcess(number, delay, signum)
    run = job.start(fault)
    statuses = run.wait()
    _expect(statuses in ([_expected(signum)], [0]), f"exit statuses {statuses}", run.text())  # 0: proved before it
    _expect_no_process(run)
    _expect((job.output / "model.safetensors").is_file(), "the model was lost", run.text())
    job.finish()
    reference.check(job)


def terminate(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGTERM or Ctrl-C to one process in a step: all of them end the step, save and say so."""
    batch, rank, signum = draw.randint(1, 2 * STEPS), draw.randrange(job.count), _ending(draw)
    _say(f"{signum.name} to process {rank} of {job.count} in batch {batch}")
    run = job.start(AtStep(batch, signum, rank=rank))
    _expect_saved_end(job, run, signum)
    job.finish()
    reference.check(job)


def terminate_evaluation(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGTERM or Ctrl-C to one process in an evaluation: all of them end after the batch and save."""
    batches, signum = EVALUATED_BATCHES // job.count, _ending(draw)
    batch, rank = draw.randint(1, batches), draw.randrange(job.count)
    _say(f"{signum.name} to process {rank} of {job.count} in batch {batch} of {batches} of evaluations")
    run = job.start(AtEvaluation(batch, signum, rank=rank))
    _expect_saved_end(job, run, signum)
    _expect("Traceback" not in run.text(), "a traceback", run.text())
    job.finish()
    reference.check(job)


def kill_evaluation(job: Job, reference: Reference, draw: random.Random) -> None:
    """SIGKILL in an evaluation."""
    batch = draw.randint(1, EVALUATED_BATCHES)
    _say(f"SIGKILL in batch {batch} of {EVALUATED_BATCHES} of evaluations")
    job.start(AtEvaluation(batch, signal.SIGKILL)).wait()
    job.finish()
    reference.check(job)


def _ending(draw: random.Random) -> signal.Signals:
    return draw.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))


def _expect_saved_end(job: Job, run: Run, signum: int) -> None:
    statuses = run.wait()
    _expect(statuses == [status_of(signum)] * job.count, f"exit statuses {statuses}", run.text())
    _expect(bool(job.checkpoints), "nothing was saved", run.text())


def damage(job: Job, reference: Reference, draw: random.Random) -> None:
    """A file of the newest checkpoint is cut or changed: the run resumes from the one before, and logs it."""
    # Late enough for two checkpoints, whether one is written every 2 steps or every 3.
    batch = draw.randint(2 * 6 + 2, 2 * STEPS - 1)
    job.start(AtStep(batch)).wait()
    newest = job.checkpoints[-1]
    path = draw.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 1))
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        _say(f"{path.name} of {newest.name} cut at byte {place} of {len(content)}")
        path.write_bytes(content[:place])
    else:
        _say(f"byte {place} of {path.name} of {newest.name} changed")
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    text = job.finish()
    _expect(f"skipping {newest}" in text, "the damage was not logged", text)
    reference.check(job)


def disk_full(job: Job, reference: Reference, draw: random.Random) -> None:
    """No space for a checkpoint or the final model: the run ends with that error; with space it resumes."""
    if os.geteuid() == 0 and draw.random() < 0.7:
        with _small_disk(job, int(draw.uniform(1.1, 2.5) * reference.checkpoint_kib)) as (size, grow):
            _say(f"a disk of {size} KiB")
            run = job.start()
            _expect(run.wait() != [0], "the disk was not full", run.text())
            _expect("disk is full" in run.text(), "not said", run.text())
            grow()
            job.finish()
            reference.check(job)
        return
    limit = draw.randint(20_000, 600_000)
    _say(f"no file above {limit} bytes")
    run = job.start(FileSizeLimit(limit))
    _expect(run.wait() != [0] and "disk is full" in run.text(), "not said", run.text())
    job.finish()
    reference.check(job)


def cache_disk_full(job: Job, reference: Reference, draw: random.Random) -> None:
    """No space for a cache: one line names it and its argument, nothing is left; with space the run succeeds."""
    which = draw.choice(("data", "distill"))
    flag, cache = f"--{which}_cache_dir", job.workspace / f"disk-{job.name}" / which
    job.flags = (*job.flags, flag, str(cache))
    if os.geteuid() != 0:
        limit = draw.randint(100, 2000)
        _say(f"no file above {limit} bytes, a new {flag}")
        run = job.start(FileSizeLimit(limit))
        _expect_full(run, flag, cache)
        job.finish()
        reference.check(job)
        return
    with _small_disk(job, 4 * draw.randint(1, 3)) as (size, grow):
        job.root = None
        _say(f"a disk of {size} KiB for {flag}")
        run = job.start()
        _expect_full(run, flag, cache)
        grow()
        job.finish()
        reference.check(job)


def _expect_full(run: Run, flag: str, cache: Path) -> None:
    statuses, text = run.wait(), run.text()
    _expect(statuses == [FAULT_STATUS] and "disk is full" in text and flag in text, "not said", text)
    _expect("Traceback" not in text and text.count("error: ") == 1, "more than a line", text)
    _expect(not list(cache.glob("*partial*")), "a part of the cache was left")


@contextmanager
def _small_disk(job: Job, kib: int):
    """A file system of `kib` KiB for the job, and what makes it large; a shell unmounts it when its input ends.

    So nothing stays mounted where this process is killed.
    """
    mount = job.workspace / f"disk-{job.name}"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(mount)], check=True)
    command = ["sh", "-c", 'read -r _; exec umount -l "$1"', "sh", str(mount)]
    unmounts = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    job.root = mount
    try:
        yield kib, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
    finally:
        unmounts.communicate()
        assert unmounts.returncode == 0, f"{mount} is still mounted"


def read_only(job: Job, reference: Reference, draw: random.Random) -> None:
    """The output folder cannot be written: refused before anything slow begins."""
    _say("a read-only output folder")
    job.output.mkdir()
    job.output.chmod(0o555)
    own = [p for p in (job.workspace, *job.workspace.parents) if Path(tempfile.gettempdir()) in p.parents]
    for path in own:  # the other user has to reach the model
        path.chmod(path.stat().st_mode | 0o055)
    run = job.start(Unprivileged())
    statuses, text = run.wait(), run.text()
    _expect(statuses == [STATUS] and "error: --output_dir" in text and "cannot be written" in text, "not refused", text)
    _expect("Loading weights" not in text, "refused only after the model was loaded", text)
    job.output.chmod(0o755)
    job.finish()
    reference.check(job)


def nan(job: Job, reference: Reference, draw: random.Random) -> None:
    """A loss of NaN: the run stops at once, its checkpoints are good."""
    batch = draw.randint(1, 2 * STEPS - 1)
    _say(f"a loss of NaN in batch {batch}")
    run = job.start(NanLoss(batch))
    statuses, text = run.wait(), run.text()
    _expect(
        statuses == [FAULT_STATUS] and "--max_nan_steps is 0" in text and "Traceback" not in text,
        f"exit statuses {statuses}",
        text,
    )
    job.finish()
    reference.check(job)


def dead_peer(job: Job, reference: Reference, draw: random.Random) -> None:
    """One of two processes is killed, or hangs: the other ends by itself."""
    rank, batch = draw.randrange(2), draw.randint(1, 2 * STEPS - 1)
    signum = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    _say(f"{signum.name} to process {rank} of 2 in batch {batch}")
    run = job.start(AtStep(batch, signum, rank=rank), "--ddp_timeout", "5")  # not where the run is continued
    other = run.processes[1 - rank]
    other.join(60)
    hung = other.is_alive()
    for process in run.processes:
        process.kill()
        process.join()
    _expect(not hung and other.exitcode != 0, f"the other process has exit status {other.exitcode}", run.text())
    job.finish()
    reference.check(job)


KINDS = (
    Kind("step", kill_in_step),
    Kind("file", kill_at_file),
    Kind("term", terminate, (*ONE, *TWO)),
    Kind("final", kill_in_final_save),
    Kind("damage", damage),
    Kind("peer", dead_peer, TWO),
    Kind("cache", end_in_data_cache),
    Kind("evaluation", terminate_evaluation, (*ONE_EVALUATED, *TWO_EVALUATED)),
    Kind("disk", disk_full),
    Kind("nan", nan),
    Kind("export", end_in_export, EXPORTED),
    Kind("teacher", end_in_teacher_cache, CACHED),
    Kind("evaluation-kill", kill_evaluation, ONE_EVALUATED),
    Kind("cache-disk", cache_disk_full, CACHED),
    Kind("time", kill_any_time, (*ONE, *TWO)),
    Kind("readonly", read_only),
    Kind("file2", kill_at_file, TWO),
)
