"""A large file written by several processes is the file that one process writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation import parts
from clseave_cli.core.translation.corpus import TranslationSummary, translate
from clseave_cli.core.translation.engine import Identity
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks

_URL = "http://127.0.0.1:9/m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of odd lines, and a memory that knows them all."""
    version = Checks("en", "de").version
    draw = random.Random(0)
    entries, lines = [], []
    for number in range(500):
        text = f"Sentence {number} " + 'ä {"x"} ' * draw.randint(0, 30)
        marks = ("added-sentence",) if number % 7 == 0 else ()
        checked = "old" if number % 50 == 0 else version
        entries.append((text, Entry(f"Satz {number}.", 1, checked, marks)))
        lines.append(json.dumps({"pairID": str(number), "sentence2": text}, ensure_ascii=False))
        if number % 11 == 0:
            lines.append("")
    lines.append(json.dumps({"pairID": "n", "sentence2": "123"}))
    (tmp_path / "snli_ve_dev.jsonl").write_text("\n".join(lines))
    with Memory(tmp_path / "memory.sqlite") as memory:
        memory.store(memory.identity_id(Identity("google", _URL, "", "", "en", "de")), entries)
    return tmp_path


def _translate(folder: Path, out: str, **options: object) -> TranslationSummary:
    return translate(
        TranslateConfig(
            data=folder, out=folder / out, lang=("de",), engine="google", url=_URL,
            memory=folder / "memory.sqlite", retries=0, retry_seconds=0.01, **options,
        )
    )  # type: ignore[arg-type]  # fmt: skip


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_spans_are_all_lines_once(folder: Path, count: int) -> None:
    path = folder / "snli_ve_dev.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for span in parts.spans(path, count):
        assert span.first_line == len(found) + 1
        assert span.start == sum(map(len, found))
        found += lines[span.first_line - 1 : span.first_line - 1 + span.num_lines]
    assert found == lines


@pytest.mark.parametrize("on_suspect", ["keep", "drop"])
def test_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch, on_suspect: str) -> None:
    alone = _translate(folder, "alone", on_suspect=on_suspect)
    monkeypatch.setattr(parts, "_LEAST_BYTES", 0)
    monkeypatch.setattr(parts, "_num_processes", lambda: 3)
    ran = []
    monkeypatch.setattr(
        parts, "_run", lambda *given, run=parts._run: ran.append(run(*given)) or ran[-1]
    )
    shared = _translate(folder, "shared", on_suspect=on_suspect)
    assert ran == [True]
    assert _tree(folder / "alone") == _tree(folder / "shared")
    (one,), (other,) = alone.files, shared.files
    assert (one.num_dropped > 70) == (on_suspect == "drop")
    for name in ("num_rows", "num_from_memory", "num_unchanged", "num_dropped", "suspicions"):
        assert getattr(one, name) == getattr(other, name), name


def test_a_row_that_is_not_known_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_LEAST_BYTES", 0)
    monkeypatch.setattr(parts, "_num_processes", lambda: 3)
    with (folder / "snli_ve_dev.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"pairID": "new", "sentence2": "Nobody knows."}))
    (file,) = _translate(folder, "out").files
    assert (file.num_rows, file.num_failed) == (502, 1)  # nobody answers at that address
    assert not list((folder / "out").glob(".*"))


def test_a_bad_line_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_LEAST_BYTES", 0)
    monkeypatch.setattr(parts, "_num_processes", lambda: 3)
    with (folder / "snli_ve_dev.jsonl").open("a") as stream:
        stream.write("\n{broken")
    number = len((folder / "snli_ve_dev.jsonl").read_text().splitlines())
    with pytest.raises(Exception, match=f"snli_ve_dev.jsonl:{number}: not valid JSON"):
        _translate(folder, "out")
    assert not list((folder / "out").glob("*"))
