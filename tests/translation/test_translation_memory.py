"""The memory: exact, shared, and safe against any end of a process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clseave_cli.core.translation.engine import Identity
from clseave_cli.core.translation.memory import Entry, Memory, default_path
from clseave_cli.errors import TranslationError

_GERMAN = Identity("google", "there", "", "", "en", "de")
_ANY_TEXT = st.text(st.characters(codec=None), max_size=40)


def _entry(translation: str, attempts: int = 1) -> Entry:
    return Entry(translation, attempts, "1", ())


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(_ANY_TEXT, _ANY_TEXT, max_size=8))
def test_keeps_any_text_exactly(texts: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.sqlite"
        with Memory(path) as memory:
            number = memory.identity_id(_GERMAN)
            memory.store(number, [(text, _entry(answer)) for text, answer in texts.items()])
        with Memory(path) as memory:
            found = memory.find(
                memory.identity_id(_GERMAN), [*texts, "something else entirely" * 3]
            )
            assert {text: entry.translation for text, entry in found.items()} == texts


def test_tells_identities_and_near_texts_apart(tmp_path: Path) -> None:
    with Memory(tmp_path / "m") as memory:
        german = memory.identity_id(_GERMAN)
        others = [
            memory.identity_id(Identity("google", "there", "", "", "en", "nl")),
            memory.identity_id(Identity("nmt", "there", "", "", "en", "de")),
            memory.identity_id(Identity("google", "there", "2", "", "en", "de")),
            memory.identity_id(Identity("google", "there", "", "beams=2", "en", "de")),
        ]
        assert len({german, *others}) == 5
        assert memory.identity_id(_GERMAN) == german
        memory.store(german, [("A dog.", Entry("Ein Hund.", 2, "1", ("copy", "length")))])
        assert memory.find(german, ["A dog.", "A dog. ", "a dog.", "A dog.\0"]) == {
            "A dog.": Entry("Ein Hund.", 2, "1", ("copy", "length"))
        }
        assert all(memory.find(other, ["A dog."]) == {} for other in others)


def test_finds_more_texts_than_sqlite_has_variables(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(25_000)]
    with Memory(tmp_path / "m") as memory:
        memory.store(1, [(text, _entry(text.upper())) for text in texts])
        found = memory.find(1, texts)
    assert {text: entry.translation for text, entry in found.items()} == {
        text: text.upper() for text in texts
    }


def test_two_owners_share_claims(tmp_path: Path) -> None:
    with Memory(tmp_path / "m") as one, Memory(tmp_path / "m") as two:
        assert one.claim(1, ["a", "b"], 1) == {"a", "b"}
        assert one.claim(1, ["a"], 1) == {"a"}  # its own
        assert two.claim(1, ["a", "b", "c"], 1) == {"c"}
        one.store(1, [("a", _entry("A"))])
        assert two.claim(1, ["a", "b"], 1) == set()  # a is known now, b still another's
        assert two.claim(1, ["a"], 2) == {"a"}  # a second attempt is another matter
        one.release(1, ["b"])
        assert two.claim(1, ["b"], 1) == {"b"}
    with Memory(tmp_path / "m") as three:
        assert three.claim(1, ["a", "b", "c"], 2) == {"a", "b", "c"}
    assert list(tmp_path.glob("*owner*")) == []


def test_a_killed_owner_loses_its_claims(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from clseave_cli.core.translation.memory import Memory\n"
        "memory = Memory(Path(sys.argv[1]))\n"
        "memory.claim(1, ['a'], 1)\n"
        "print('claimed', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process, Memory(tmp_path / "m") as memory:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        assert memory.claim(1, ["a"], 1) == set()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert memory.claim(1, ["a"], 1) == {"a"}
        assert len(list(tmp_path.glob("*owner*"))) == 1  # the dead one's is swept up


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to look like one" * 40, b"x"]
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(TranslationError, match=r"notes\.txt.*--memory"):
        Memory(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "other")
    connection.execute("CREATE TABLE songs (name)")
    connection.close()
    with pytest.raises(TranslationError, match="not a translation memory of this version"):
        Memory(tmp_path / "other")


def test_a_damaged_page_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Memory(path) as memory:
        memory.store(1, [(f"text {i}", _entry("x" * 100)) for i in range(500)])
    data = bytearray(path.read_bytes())
    data[4096 * 5 : 4096 * 9] = os.urandom(4096 * 4)
    path.write_bytes(data)
    with pytest.raises(TranslationError, match="damaged; move it away"), Memory(path) as memory:
        memory.find(1, [f"text {i}" for i in range(500)])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TranslationError, match="choose another file with --memory"):
        Memory(tmp_path / "file" / "m")


def test_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLSEAVE_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "translation" / "memory.sqlite"
