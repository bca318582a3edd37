"""The rules of the house: imports run one way, and `qat` knows nothing of trainers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "qat": {"qat"},
    "data": {"data", "qat"},
    "training": {"training", "data", "qat"},
    "utils": {"data", "training", "qat"},
    "main": {"utils", "training", "data", "qat"},
}
LAYERS = ["formats", "packing", "reference", "kernels", "ops", "schemes", "tensor_quantizer", "quant_linear", "prepare"]


def imported_modules(path: Path) -> set[str]:
    """Absolute names that a file imports; relative imports are resolved against its package."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            names.update({base.strip(".")} if node.module else {f"{base.strip('.')}.{a.name}" for a in node.names})
    return names


def files_of(unit: str) -> list[Path]:
    return sorted((ROOT / unit).rglob("*.py")) if (ROOT / unit).is_dir() else [ROOT / f"{unit}.py"]


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_run_one_way(unit):
    own = {name.split(".")[0] for path in files_of(unit) for name in imported_modules(path)} & set(ALLOWED)
    assert own <= ALLOWED[unit]


def test_the_core_knows_no_trainer_and_auto_round_in_schemes_only():
    users = {}
    for path in files_of("qat"):
        for name in imported_modules(path):
            users.setdefault(name.split(".")[0], set()).add(path.name)
    assert not {"accelerate", "datasets", "transformers"} & set(users)
    assert users["auto_round"] == {"schemes.py"}


def test_within_the_core_lower_layers_do_not_import_higher_ones():
    for path in files_of("qat"):
        unit = path.relative_to(ROOT / "qat").parts[0].removesuffix(".py")
        if unit not in LAYERS:
            continue
        used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("qat.")}
        higher = set(LAYERS[LAYERS.index(unit) + 1 :])
        assert not used & higher, f"{path.name} imports {used & higher}"
