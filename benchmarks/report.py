"""Report: figures as they come, one table at the end, one CSV with machine, versions, date and command."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import sys
from pathlib import Path

import torch

from qat.errors import UserError


def check_device(device: str) -> None:
    """Raise a UserError for a GPU that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this measures a GPU (cuda), and there is none; where there is --device, give --device cpu")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whatever ends this process, and whoever writes it too."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def environment(device: str) -> dict[str, str]:
    """What a figure depends on besides the code: device, cores, versions, date, command.

    Raises:
        UserError: the device is a GPU, and there is none.
    """
    check_device(device)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    versions = [f"torch {torch.__version__.split('+')[0]}", f"Python {platform.python_version()}"]
    for module in ("triton", "transformers"):
        if module in sys.modules:
            versions.append(f"{module} {sys.modules[module].__version__}")
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]),
    }


def cpu_name() -> str:
    """The processor as the system names it, with the instruction set that PyTorch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


class Report:
    """Rows of figure, value, unit and what was to be reached."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        check_device(device)  # before anything is measured
        self.name, self.device, self.rows = name, device, []

    def add(self, figure: str, value: float, reach: str = "", unit: str = "") -> None:
        """Keep a row and show it at once."""
        self.rows.append({"figure": figure, "value": f"{value:.4g}", "unit": unit, "reach": reach})
        print(f"{figure:<64}{value:>10.4g} {unit:<5}{reach:>6}", flush=True)

    def note(self, text: str) -> None:
        """Add a text that is not a figure."""
        print(text, flush=True)

    def write(self, folder: Path) -> None:
        """Print the whole table and write `folder/NAME.csv`."""
        folder.mkdir(parents=True, exist_ok=True)
        about = environment(self.device)
        print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
        print(f"\n{'figure':<64}{'value':>10} {'unit':<5}{'reach':>6}")
        for row in self.rows:
            print(f"{row['figure']:<64}{row['value']:>10} {row['unit']:<5}{row['reach']:>6}")
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["figure", "value", "unit", "reach", *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **about} for row in self.rows)


def check_source(note: Path, model: str, gguf_file: str | None) -> str:
    """What `note` should hold for the figures beside it to be of this model.

    Raises:
        UserError: it holds another one.
    """
    source = f"{Path(model).resolve()} {gguf_file or ''}".strip()
    if note.exists() and (written := note.read_text()) != source:
        raise UserError(
            f"--out: {note.parent} is of another model, {written or 'which it does not name'}, and not of {source}; "
            "give another folder"
        )
    return source
