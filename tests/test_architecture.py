"""The rules of the house: every file is in a room, imports run one way, and `qat` knows nothing of trainers."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

# Which rooms a room may import. A room is a folder; the files beside the rooms of a package are its faces.
ROOMS = {
    "qat/files": set(),
    "qat/numerics": set(),
    "qat/schemes": {"qat/files", "qat/numerics"},
    "qat/layers": {"qat/numerics", "qat/schemes"},
    "qat/transforms": {"qat/numerics", "qat/schemes", "qat/layers"},
    "qat/compensation": {"qat/numerics", "qat/schemes", "qat/layers"},
    "qat/checkpoints": {"qat/files", "qat/numerics", "qat/schemes", "qat/layers"},
    "data/bad_samples.py": set(),
    "data/sources": {"data/bad_samples.py"},
    "data/conversations": {"data/bad_samples.py"},
    "data/sets": {"data/bad_samples.py", "data/sources", "data/conversations", "qat/files"},
    "data/tokenizer.py": {"qat/files"},
    "data/supervised.py": {"data/*", "qat/files"},
    "data/command_line.py": set(),
    "data/preview.py": {"data/*", "qat/files"},
    "training/arguments": {"qat/*", "data/*"},
    "training/backends": {"qat/*"},
    "training/losses": {"data/*", "qat/numerics"},
    "training/monitoring": {"qat/*"},
    "training/teachers": {"qat/*", "data/*", "training/arguments", "training/backends", "training/losses"},
    "training/optimizers": {"qat/*"},
    "training/resume": {"qat/*", "training/backends"},
    "training/start": {"qat/*", "data/*", "training/arguments", "training/backends"},
    "training/adapters": {
        "qat/*", "training/arguments", "training/backends", "training/resume", "training/start",
    },
    "training/sensitivity": {
        "qat/*", "data/*", "training/arguments", "training/backends", "training/losses", "training/monitoring",
        "training/start",
    },
    "training/estimate": {
        "qat/*", "data/*", "training/adapters", "training/arguments", "training/losses", "training/optimizers",
        "training/start",
    },
    "training/checks.py": {
        "qat/*", "data/*", "training/adapters", "training/arguments", "training/resume", "training/start",
        "training/teachers",
    },
    "training/saving.py": {"qat/*", "training/adapters", "training/backends"},
    "training/trainer.py": {
        "qat/*", "data/*", "training/arguments", "training/backends", "training/losses", "training/monitoring",
        "training/adapters", "training/optimizers", "training/resume", "training/saving.py", "training/teachers",
    },
    "training/trainer_overrides.py": set(),
    "utils.py": {"data/*", "training/*"},
    "main.py": {"utils.py", "data/*", "training/*", "qat/*"},
}  # fmt: skip
FLOORS = {"qat": 4, "data": 5, "training": 5}  # rooms in the longest chain of imports
LOADS_MODELS = "qat/checkpoints"  # the only room of qat that imports transformers
FACES = {
    "qat/__init__.py", "qat/version.py", "qat/errors.py", "qat/processes.py", "qat/command_line.py",
    "data/__init__.py", "training/__init__.py",
}  # fmt: skip


@cache
def files() -> dict[str, str]:
    """Every file of the product by its path, and the room it is in."""
    paths = [p for top in ("qat", "data", "training") for p in sorted((ROOT / top).rglob("*.py"))]
    names = [str(path.relative_to(ROOT)) for path in (*paths, ROOT / "main.py", ROOT / "utils.py")]
    return {name: room_of(name) for name in names if name not in FACES}


def room_of(name: str) -> str:
    """ "qat/numerics" for "qat/numerics/kernels/cpu.py"; a face is a room of its own."""
    return name if name in ROOMS else "/".join(name.split("/")[:2])


def imported(path: Path) -> Iterable[str]:
    """Dotted names of modules that a file imports, relative ones resolved against its package."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def edges() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, room in files().items():
        for module in imported(ROOT / name):
            target = module.replace(".", "/")
            hit = next((f for f in (f"{target}.py", f"{target}/__init__.py") if f in files()), None)
            if hit is not None and files()[hit] != room:
                found[room].add(files()[hit])
    return found


def test_every_file_is_in_a_room_and_every_room_has_files():
    homeless = [name for name, room in files().items() if room not in ROOMS]
    assert not homeless
    assert set(files().values()) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    allowed = ROOMS[room]
    wrong = {r for r in edges()[room] if r not in allowed and f"{r.split('/')[0]}/*" not in allowed}
    assert not wrong


def test_of_qat_the_data_sees_files_alone():
    seen = {r for room, targets in edges().items() if room.startswith("data/") for r in targets}
    assert {room for room in seen if room.startswith("qat/")} <= {"qat/files"}


@pytest.mark.parametrize("package", FLOORS)
def test_the_longest_chain_of_imports_is_as_short_as_it_is_said_to_be(package):
    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"a circle: {' -> '.join((*above, room))}"
        below = [r for r in edges()[room] if r.startswith(f"{package}/")]
        return 1 + max((floor(r, (*above, room)) for r in below), default=0)

    assert max(floor(room) for room in ROOMS if room.startswith(f"{package}/")) == FLOORS[package]


def test_the_core_knows_no_trainer_and_loads_models_in_one_room_only():
    users: dict[str, set[str]] = {}
    for name, room in files().items():
        for module in imported(ROOT / name) if name.startswith("qat/") else ():
            users.setdefault(module.split(".")[0], set()).add(room)
    assert not {"accelerate", "auto_round", "datasets", "data", "training", "utils", "main"} & set(users)
    assert users["transformers"] == {LOADS_MODELS}
    assert "qat/numerics" not in set().union(*(rooms for name, rooms in users.items() if name in ("numpy", "tqdm")))


def test_slow_libraries_are_imported_where_they_are_used():
    slow = {"auto_round", "compressed_tensors", "matplotlib", "pandas", "scipy", "sklearn", "tensorboard", "triton"}
    for name in files():
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in tree.body:  # not those inside functions and conditions
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            assert not slow & {imported.split(".")[0] for imported in names}, name
