"""The translation memory, which saves translating anything twice.

One SQLite file in WAL mode, shared by any number of processes on one machine. Translations are
keyed by engine, model, revision, settings, languages and exact text, each with a checksum. The
memory also records which files `translate` wrote, so that no other file is replaced.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clseave_cli.core.files import cache_root, file_digest
from clseave_cli.core.translation.engine import Identity, encode
from clseave_cli.errors import TranslationError

_FORMAT = 2
_BUSY_SECONDS = 60.0
_CACHE_KIB = 64 * 1024
_MAX_VARIABLES = 10_000

# Texts are BLOBs, because they may hold lone surrogates. `attempts`: requests made. `checked`:
# version of the checks, '' if there were none. `suspicions`: names of failed checks, separated by
# spaces. `checksum`: of all of these and the identity, as SQLite does not notice flipped bits.
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS identities (id INTEGER PRIMARY KEY, engine TEXT NOT NULL,"
    " model TEXT NOT NULL, revision TEXT NOT NULL, settings TEXT NOT NULL, source TEXT NOT NULL,"
    " target TEXT NOT NULL, UNIQUE (engine, model, revision, settings, source, target))",
    "CREATE TABLE IF NOT EXISTS translations (identity INTEGER NOT NULL, text NOT NULL,"
    " translation NOT NULL, attempts INTEGER NOT NULL, checked TEXT NOT NULL,"
    " suspicions TEXT NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (identity, text))"
    " WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS outputs (path BLOB NOT NULL, digest TEXT NOT NULL,"
    " PRIMARY KEY (path, digest)) WITHOUT ROWID",
)
# Format 1 had no checksums, kept unusable answers, and had texts as TEXT and a table of claims.
_FROM_FORMAT_1 = (
    "ALTER TABLE translations ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0",
    "DELETE FROM translations WHERE typeof(translation) = 'blob' OR trim(translation) = ''",
    "UPDATE translations SET text = CAST(text AS BLOB), translation = CAST(translation AS BLOB),"
    " checksum = checksum_of(identity, text, translation, attempts, checked, suspicions)",
    "DROP TABLE IF EXISTS claims",
)
_IDENTITY = "engine, model, revision, settings, source, target"
# Advice by pattern of SQLite's message.
_ADVICE = {
    "full": "free some space there and run the same command again.",
    "locked|busy": f"another process has locked it for {_BUSY_SECONDS:.0f} s; try again.",
    "readonly|unable to open": "choose another file with --memory.",
}


class Entry(NamedTuple):
    """A translation in the memory; `_SCHEMA` describes the columns."""

    translation: str
    attempts: int
    checked: str
    suspicions: tuple[str, ...]


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


class Memory(AbstractContextManager["Memory"]):
    """A connection to the memory, for one thread. What was stored survives a kill.

    The SQLite file `path` is created if missing; None is the one in the cache.

    Raises:
        TranslationError: the file is not a translation memory, is damaged or cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path = path or cache_root() / "translation" / "memory.sqlite"
        self._seeds: dict[int, int] = {}
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite takes any tiny file for an empty database and would overwrite it.
            with suppress(FileNotFoundError), path.open("rb") as stream:
                if stream.read(16) not in (b"", b"SQLite format 3\0"):
                    raise TranslationError(
                        f"{path}: not a translation memory; choose another file with --memory."
                    )
            self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            # Damaged bytes must reach the checksum instead of failing the whole query.
            self._connection.text_factory = bytes
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        execute = self._connection.execute
        with suppress(sqlite3.OperationalError):
            # Fails while another process opens the file, which then makes the switch for both.
            execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing in NORMAL mode; a power cut may lose the last moments.
        execute("PRAGMA synchronous = NORMAL")
        execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        with self._writing():
            version = execute("PRAGMA user_version").fetchone()[0]
            is_empty = not execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version not in (1, _FORMAT) and (version or not is_empty):
                raise TranslationError(
                    f"{self.path}: not a translation memory of this version of clseave; "
                    "choose another file with --memory."
                )
            if version == 1:
                self._read_seeds()
                self._connection.create_function(
                    "checksum_of", 6, lambda number, *v: _checksum(self._seeds.get(number, 0), *v)
                )
                for statement in _FROM_FORMAT_1:
                    execute(statement)
            for statement in _SCHEMA:
                execute(statement)
            execute(f"PRAGMA user_version = {_FORMAT}")

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def identity_id(self, identity: Identity) -> int:
        """The number of an identity in the memory."""
        values = dataclasses.astuple(identity)
        with self._writing():
            self._connection.execute(
                f"INSERT OR IGNORE INTO identities ({_IDENTITY}) VALUES (?, ?, ?, ?, ?, ?)", values
            )
            self._read_seeds()
        numbers = {seed: number for number, seed in self._seeds.items()}
        if (seed := _checksum(0, *values)) not in numbers:
            raise self._explain("its table of identities contradicts itself")
        return numbers[seed]

    def _read_seeds(self) -> None:
        # Checksums include the identity, because a damaged number would lead to another language.
        rows = self._connection.execute(f"SELECT id, {_IDENTITY} FROM identities").fetchall()
        self._seeds = {number: _checksum(0, *values) for number, *values in rows}

    def find(self, identity: int, texts: Iterable[str]) -> dict[str, Entry]:
        """The entries of `texts`; missing and damaged ones are omitted."""
        entries: dict[str, Entry] = {}
        seed = self._seeds.get(identity, 0)
        keys = [encode(text) for text in texts]
        for start in range(0, len(keys), _MAX_VARIABLES):
            chunk = keys[start : start + _MAX_VARIABLES]
            query = (
                "SELECT text, translation, attempts, checked, suspicions, checksum"
                " FROM translations WHERE identity = ?"
                f" AND text IN ({','.join('?' * len(chunk))})"
            )
            with self._errors():
                rows = self._connection.execute(query, (identity, *chunk)).fetchall()
            for *values, checksum in rows:
                if _checksum(seed, *values) == checksum:
                    text, translation, attempts, checked, suspicions = values
                    marks = tuple(suspicions.decode().split()) if suspicions else ()
                    entry = Entry(_decode(translation), attempts, checked.decode(), marks)
                    entries[_decode(text)] = entry
        return entries

    def store(self, identity: int, entries: Iterable[tuple[str, Entry]]) -> None:
        """Stores translations, replacing older ones."""
        rows, seed = [], self._seeds.get(identity, 0)
        for text, (translation, attempts, checked, suspicions) in entries:
            values = encode(text), encode(translation), attempts, checked, " ".join(suspicions)
            rows.append((identity, *values, _checksum(seed, *values)))
        with self._writing():
            self._connection.executemany(
                "INSERT OR REPLACE INTO translations VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )

    def record_output(self, path: Path, contents: Path) -> None:
        """Records that `translate` is writing `contents` to `path`."""
        values = _path_key(path), file_digest(contents)
        with self._writing():
            self._connection.execute("INSERT OR IGNORE INTO outputs VALUES (?, ?)", values)

    def has_written(self, path: Path) -> bool:
        """Whether `translate` wrote the file at `path`, unchanged since."""
        query = "SELECT 1 FROM outputs WHERE path = ? AND digest = ?"
        values = _path_key(path), file_digest(path)
        with self._errors():
            return self._connection.execute(query, values).fetchone() is not None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._errors(), self._connection:  # commits, or rolls back after an exception
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explain(str(error)) from error
        except OSError as error:
            raise TranslationError(
                f"{self.path}: cannot be opened ({error.strerror}); choose another with --memory."
            ) from error

    def _explain(self, message: str) -> TranslationError:
        advice = next(
            (advice for pattern, advice in _ADVICE.items() if re.search(pattern, message)),
            "the file is damaged; move it away, or choose another with --memory.",
        )
        return TranslationError(f"{self.path}: the translation memory fails ({message}): {advice}")


def _checksum(seed: int, *values: object) -> int:
    data = b"\0".join([v if type(v) is bytes else str(v).encode() for v in values])
    return zlib.crc32(data, seed)


def _path_key(path: Path) -> bytes:
    return os.fsencode(path.parent.resolve() / path.name)
