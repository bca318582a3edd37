"""Everything that is imported is declared: by requirements.txt for the application, by pyproject.toml for `qat`."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from qat.version import VERSION

APPLICATION = ("main.py", "utils.py", "qat", "data", "training", "scripts")
# Folders from which files of ours are imported by bare names.
ON_THE_PATH = ("", "tests", "scripts", "scripts/tasks", "serving")
OPTIONAL = {
    "triton": "torch brings it where there are GPUs; elsewhere the kernels are left out",
    "vllm": "scripts/evaluate.py --backend vllm runs in vLLM's own environment",
}
NOT_IMPORTED = {"accelerate": "transformers asks for it where a model is loaded with a device_map"}


@cache
def third_party(*places: str) -> dict[str, str]:
    """The modules that files in `places` import from outside, and one file that does, by the modules' names."""
    folders = [ROOT / place for place in places]
    files = [file for path in folders for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    ours = {path.stem for folder in ON_THE_PATH for path in (ROOT / folder).iterdir()}
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in ours:
                    found.setdefault(name, str(file.relative_to(ROOT)))
    return found


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> dict[str, Requirement]:
    """Requirements by canonical name; comments and empty lines have none."""
    lines = (line.partition("#")[0].strip() for line in requirements)
    return {canonical(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}


def in_file(name: str) -> dict[str, Requirement]:
    """The requirements in a file."""
    return declared((ROOT / name).read_text(encoding="utf-8").splitlines())


@cache
def providers_of_modules() -> Mapping[str, list[str]]:
    """Of each module that can be imported, the distributions that have it; found in a tenth of a second."""
    return packages_distributions()


def undeclared(modules: dict[str, str], requirements: dict[str, Requirement]) -> dict[str, str]:
    """Those of `modules` whose distributions are not among `requirements`."""
    providers = providers_of_modules()
    return {
        module: file
        for module, file in modules.items()
        if module not in OPTIONAL and not {canonical(d) for d in providers.get(module, [module])} & requirements.keys()
    }


@cache
def project() -> dict:
    """The [project] table and its neighbours."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_import_of_the_application_is_declared():
    assert {"torch", "yaml", "numpy", "huggingface_hub"} <= third_party(*APPLICATION).keys()
    assert not undeclared(third_party(*APPLICATION), in_file("requirements.txt"))


def test_every_import_of_the_tests_is_declared():
    assert not undeclared(third_party("tests"), in_file("requirements.txt") | in_file("tests/requirements.txt"))


def test_the_package_declares_what_qat_imports_and_nothing_else():
    dependencies = declared(project()["project"]["dependencies"])
    assert not undeclared(third_party("qat"), dependencies)
    used = {canonical(d) for module in third_party("qat") for d in providers_of_modules().get(module, [])}
    assert dependencies.keys() - used == NOT_IMPORTED.keys()


def test_package_and_application_declare_the_same_ranges():
    application = in_file("requirements.txt")
    for name, requirement in declared(project()["project"]["dependencies"]).items():
        assert application[name].specifier == requirement.specifier, name


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_has_a_tested_version(name):
    pinned = in_file("constraints.txt")
    for distribution, requirement in in_file(name).items():
        (pin,) = pinned[distribution].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), distribution


def test_the_version_is_a_literal_that_a_build_reads_without_importing_torch():
    (assignment,) = (n for n in ast.parse((ROOT / "qat/version.py").read_text()).body if isinstance(n, ast.Assign))
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qat.version.VERSION"}
    assert ast.literal_eval(assignment.value) == VERSION


def test_the_package_holds_every_file_of_qat():
    patterns = project()["tool"]["setuptools"]["package-data"]["qat"]
    held = {path for pattern in patterns for path in (ROOT / "qat").glob(pattern)}
    others = {p for p in (ROOT / "qat").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == held
    assert all((folder / "__init__.py").is_file() for folder in {p.parent for p in Path(ROOT / "qat").rglob("*.py")})
