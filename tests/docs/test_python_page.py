"""docs/python.md: its example runs, and it lists the functions of the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import clseave_cli
from clseave_cli.errors import UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, world, clip, encoder, monkeypatch, capsys):
    for source, name in ((world, "data"), (clip, "models/clip"), (encoder, "models/encoder")):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, example = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/python.md", "exec"), {})
    out, err = capsys.readouterr()
    first, *_, label = out.splitlines()
    assert first.startswith(str(Path("runs", "clip-ve"))) and "accuracy" in first
    assert label in ("entailment", "neutral", "contradiction")
    assert re.search(r"^de \d+\.\d%$", out, re.MULTILINE) and err == ""
    assert (tmp_path / "report" / "results.json").is_file()


def test_the_functions_of_the_page_are_those_of_the_package():
    functions = set(re.findall(r"^\| `(\w+)` \| `clseave ", PAGE, re.MULTILINE))
    assert functions | {"VisualEntailment", "Prediction", "__version__"} == set(clseave_cli.__all__)


def test_a_wrong_option_is_refused_as_a_flag_is():
    with pytest.raises(UsageError, match="no option named langs; did you mean lang"):
        clseave_cli.align(langs=("de",))
    with pytest.raises(UsageError, match="--preset mine: unknown; there are: thesis, mini-ve"):
        clseave_cli.align(preset="mine")
    with pytest.raises(UsageError, match="--projection mlp was removed"):
        clseave_cli.align(projection="mlp")
    with pytest.raises(UsageError, match=r"--config no.toml: cannot be read \(No such"):
        clseave_cli.align(config="no.toml")
    with pytest.raises(AttributeError, match="no attribute 'aline'"):
        clseave_cli.aline  # noqa: B018
