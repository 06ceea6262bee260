"""The import rule of docs/architecture.md, checked on every module's syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clseave_cli

ROOT = Path(clseave_cli.__file__).parent
PACKAGE = "clseave_cli"

#: From the top down; a module may import from its own layer or a lower one.
LAYERS = ("main", "commands", "use cases", "machinery", "models and data", "ground")

#: Modules directly in core/ that are no use case, by layer.
_MACHINERY = {
    "training", "features", "translation", "metrics", "reporting", "results", "rows", "linguistics",
    "identification", "inference", "serving", "word_alignment",
}  # fmt: skip
_GROUND = {"files", "progress", "pipeline", "config", "launch"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def layer(module: str) -> int:
    """The number in LAYERS of a module, named without the package's own name."""
    match module.split("."):
        case ["main" | "__main__"]:
            name = "main"
        case ["commands", *_]:
            name = "commands"
        case ["" | "errors" | "labels"] | ["core"]:
            name = "ground"
        case ["core", "models" | "data", *_]:
            name = "models and data"
        case ["core", part, *_] if part in _GROUND:
            name = "ground"
        case ["core", part, *_] if part in _MACHINERY:
            name = "machinery"
        case ["core", _] | ["core", "alignment", _]:
            name = "use cases"
        case _:
            raise AssertionError(f"{module}: belongs to no layer; see docs/architecture.md")
    return LAYERS.index(name)


def is_use_case(module: str) -> bool:
    return LAYERS[layer(module)] == "use cases"


def imported(path: Path) -> list[tuple[int, str]]:
    """The modules of this package that a file imports, anywhere in it, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [node.module or ""]
            # `from package import module` imports the module as well.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(PACKAGE + "."):
                module = name.removeprefix(PACKAGE).removeprefix(".")
                if module in MODULES:
                    found.append((node.lineno, module))
    return found


def test_the_test_sees_imports_of_every_spelling(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_only(module: str) -> None:
    if module == "":
        return  # the package itself offers the library's names, loaded on first use
    own = layer(module)
    for line, other in imported(MODULES[module]):
        where = f"{MODULES[module]}:{line}"
        assert layer(other) >= own, (
            f"{where}: {LAYERS[own]} import from {LAYERS[layer(other)]} ({other})"
        )
        same = module.split(".")[:2] == other.split(".")[:2]
        assert same or not (is_use_case(module) and is_use_case(other)), (
            f"{where}: one use case imports another ({other}); what both need belongs below"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core")])
def test_the_core_knows_no_terminal_and_prints_nothing(module: str) -> None:
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in ("typer", "click", "rich"), f"{path}: {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{path}:{node.lineno}: prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_stream = node.value.id == "sys" and node.attr in ("stdout", "stderr", "stdin")
            assert not is_stream, f"{path}:{node.lineno}: sys.{node.attr}"
