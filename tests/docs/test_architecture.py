"""The import rule of docs/architecture.md, checked on every module's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import clseave_cli

ROOT = Path(clseave_cli.__file__).parent
PACKAGE = "clseave_cli"

#: From the top down. A module may import from its room or from a room on a lower floor; modules
#: directly in the package or in core/ are rooms of one file.
FLOORS = (
    {"__main__"},
    {"main"},
    {"commands"},
    {"core.evaluation", "core.prediction"},
    {"core.alignment", "core.finetuning", "core.pretraining"},
    {"core.guided", "core.translation"},
    {"core.features"},
    {"core.training", "core.models"},
    {"core.data"},
    {"core.config", "core.files"},
    {"core", "errors", "labels", "processes", "progress", "version"},
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


#: Every module, by its name without the package's.
MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "core" else parts[0]


def floor(module: str) -> int:
    """The number in FLOORS of a module's room."""
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise AssertionError(f"{module}: not in FLOORS; see docs/architecture.md")


def import_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from package import module` imports the module as well.
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and name of every module of this package that a file imports."""
    return [
        (line, name.removeprefix(f"{PACKAGE}."))
        for line, name in import_names(path)
        if name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in MODULES
    ]


def test_the_test_sees_imports_of_every_spelling(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import clseave_cli.errors\n"
        "from clseave_cli.core.data.records import Split\n"
        "def f():\n    from clseave_cli.core import alignment, files\n"
        "import torch\n"
    )
    assert {module for _, module in imported(source)} == {
        "errors", "core.data.records", "core", "core.alignment", "core.files",
    }  # fmt: skip


@pytest.mark.parametrize("module", [name for name in MODULES if name])  # "" is the package itself
def test_imports_go_downward_only(module):
    for line, other in imported(MODULES[module]):
        assert room(other) == room(module) or floor(other) > floor(module), (
            f"{MODULES[module]}:{line}: imports {other}, which is not on a lower floor"
        )


def test_no_two_modules_import_each_other():
    below = {name: {other for _, other in imported(path)} for name, path in MODULES.items()}
    mutual = {
        tuple(sorted((module, other)))
        for module, others in below.items()
        for other in others
        if module != other and module in below[other]
    }
    assert not mutual


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core")])
def test_the_core_knows_no_terminal_and_prints_nothing(module):
    path = MODULES[module]
    for line, name in import_names(path):
        assert name.split(".")[0] not in ("typer", "click", "rich"), f"{path}:{line}: {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{path}:{node.lineno}: prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_stream = node.value.id == "sys" and node.attr in ("stdout", "stderr", "stdin")
            assert not is_stream, f"{path}:{node.lineno}: sys.{node.attr}"
