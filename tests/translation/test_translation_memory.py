"""The memory: exact, shared, and safe against any end of a process."""

import contextlib
import os
import random
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clseave_cli.core.translation.engine import Identity
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.errors import TranslationError

_GERMAN = Identity("google", "there", "", "", "en", "de")
_ANY_TEXT = st.text(st.characters(codec=None), max_size=40)


def _entries(translations):
    return {text: Entry(answer, 1, "1", ()) for text, answer in translations.items()}


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(_ANY_TEXT, _ANY_TEXT, max_size=8))
def test_keeps_any_text_exactly(texts):
    entries = _entries(texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.sqlite"
        with Memory(path) as memory:
            memory.store(memory.identity_id(_GERMAN), [*entries.items()])
        with Memory(path) as memory:
            number = memory.identity_id(_GERMAN)
            assert memory.find(number, [*texts, "something else entirely" * 3]) == entries


def test_tells_identities_and_near_texts_apart(tmp_path):
    entry = Entry("Ein Hund.", 2, "1", ("copy", "length"))
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
        memory.store(german, [("A dog.", entry)])
        near = ["A dog.", "A dog. ", "a dog.", "A dog.\0"]
        assert memory.find(german, near) == {"A dog.": entry}
        assert all(memory.find(other, ["A dog."]) == {} for other in others)


def test_finds_more_texts_than_sqlite_has_variables(tmp_path):
    entries = _entries({f"text {index}": f"TEXT {index}" for index in range(25_000)})
    with Memory(tmp_path / "m") as memory:
        memory.store(1, [*entries.items()])
        assert memory.find(1, entries) == entries


def test_a_flipped_bit_is_never_read(tmp_path):
    """G10. The entry is missing then, or the file is reported as damaged."""
    entries = _entries({f"A man {index}.": f"Ein Mann {index}, größer." for index in range(40)})
    path = tmp_path / "m"
    with Memory(path) as memory:
        number = memory.identity_id(_GERMAN)
        memory.identity_id(Identity("google", "there", "", "", "en", "nl"))
        memory.store(number, [*entries.items()])
    content = path.read_bytes()
    draw = random.Random(0)
    in_text = content.index(b"Ein Mann 7,")
    for place in (in_text, *(draw.randrange(len(content)) for _ in range(100))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(TranslationError), Memory(path) as memory:
            sound = memory.find(memory.identity_id(_GERMAN), entries)
            assert sound.items() <= entries.items(), place
            assert place != in_text or len(sound) == 39


def test_a_memory_of_the_first_format_is_taken_over(tmp_path):
    connection = sqlite3.connect(tmp_path / "m")
    connection.executescript(
        "CREATE TABLE identities (id INTEGER PRIMARY KEY, engine TEXT NOT NULL, model TEXT,"
        " revision TEXT, settings TEXT, source TEXT, target TEXT,"
        " UNIQUE (engine, model, revision, settings, source, target));"
        "INSERT INTO identities VALUES (1, 'google', 'there', '', '', 'en', 'de');"
        "CREATE TABLE translations (identity INTEGER NOT NULL, text NOT NULL, translation NOT NULL,"
        " attempts INTEGER NOT NULL, checked TEXT NOT NULL, suspicions TEXT NOT NULL,"
        " PRIMARY KEY (identity, text)) WITHOUT ROWID;"
        "INSERT INTO translations VALUES (1, 'A dog.', 'Ein Hund.', 2, '1', 'copy length');"
        "INSERT INTO translations VALUES (1, 'empty', ' ', 1, '1', 'empty');"
        "INSERT INTO translations VALUES (1, 'half', x'eda080', 1, '1', '');"
        "CREATE TABLE claims (identity INTEGER, text, owner TEXT);"
        "PRAGMA user_version = 1"
    )
    connection.close()
    with Memory(tmp_path / "m") as memory:
        # Answers that no reader takes are asked for again.
        assert memory.find(memory.identity_id(_GERMAN), ["A dog.", "empty", "half"]) == {
            "A dog.": Entry("Ein Hund.", 2, "1", ("copy", "length"))
        }


def test_another_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name)")
    with pytest.raises(TranslationError, match="not a translation memory of this version"):
        Memory(path)
    for content in (b"not a database, but long enough to look like one" * 40, b"x"):
        path.write_bytes(content)
        with pytest.raises(TranslationError, match=r"notes\.txt.*--memory"):
            Memory(path)
        assert path.read_bytes() == content
    with pytest.raises(TranslationError, match="choose another with --memory"):
        Memory(path / "m")


def test_a_damaged_page_is_reported(tmp_path):
    path = tmp_path / "m"
    entries = _entries({f"text {i}": "x" * 100 for i in range(500)})
    with Memory(path) as memory:
        memory.store(1, [*entries.items()])
    data = bytearray(path.read_bytes())
    data[4096 * 5 : 4096 * 9] = os.urandom(4096 * 4)
    path.write_bytes(data)
    with pytest.raises(TranslationError, match="damaged; move it away"), Memory(path) as memory:
        memory.find(1, entries)


def test_lies_in_the_cache(cache):
    with Memory(None):
        assert (cache / "translation" / "memory.sqlite").is_file()
