"""docs/cli.md is up to date and documents every command and flag."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from clseave_cli.main import app

DOCS = Path(__file__).parents[2] / "docs"
GROUP: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(command: str) -> str:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return next(part for part in sections if part.startswith(f"clseave {command}\n"))


def test_it_is_up_to_date(generator):
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert written == generator.reference(), "run: python docs/generate_cli.py"


def test_check_refuses_an_old_page(generator, tmp_path, monkeypatch):
    old = tmp_path / "cli.md"
    old.write_text((DOCS / "cli.md").read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    monkeypatch.setattr(generator, "REFERENCE", old)
    monkeypatch.setattr("sys.argv", ["generate_cli.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        generator._main()
    monkeypatch.setattr("sys.argv", ["generate_cli.py"])
    generator._main()
    monkeypatch.setattr("sys.argv", ["generate_cli.py", "--check"])
    generator._main()


@pytest.mark.parametrize("command", GROUP.commands)
def test_every_flag_is_documented_and_has_a_help_text(command):
    text = section(command)
    for parameter in GROUP.commands[command].params:
        assert parameter.help, f"{parameter.name} has no help text"
        if parameter.param_type_name == "argument":
            assert f"`{parameter.name.upper()}`" in text
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("-"):
                assert f"`{flag}`" in text, flag
