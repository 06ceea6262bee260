"""The translation memory: what an engine once said is never asked for again.

One SQLite file in WAL mode, shared by any number of processes of one machine. Sentences are kept
by engine, model, revision, settings, languages and exact text. A process *claims* sentences before
it has them translated, so two processes at work on the same file divide it between them; a claim
dies with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from clseave_cli.core.files import cache_root
from clseave_cli.core.translation.engine import Identity
from clseave_cli.errors import ClseaveError, TranslationError

_FORMAT = 1
_BUSY_SECONDS = 60.0
_CACHE_KIB = 64 * 1024
_MAX_VARIABLES = 10_000

# Texts are TEXT, or BLOBs where lone surrogates forbid that: the columns have no type. `attempts`:
# how often the engine was asked. `checked`: version of the checks that were made, '' for none.
# `suspicions`: the names of those that found something, separated by spaces.
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS identities (id INTEGER PRIMARY KEY, engine TEXT NOT NULL,"
    " model TEXT NOT NULL, revision TEXT NOT NULL, settings TEXT NOT NULL, source TEXT NOT NULL,"
    " target TEXT NOT NULL, UNIQUE (engine, model, revision, settings, source, target))",
    "CREATE TABLE IF NOT EXISTS translations (identity INTEGER NOT NULL, text NOT NULL,"
    " translation NOT NULL, attempts INTEGER NOT NULL, checked TEXT NOT NULL,"
    " suspicions TEXT NOT NULL, PRIMARY KEY (identity, text)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS claims (identity INTEGER NOT NULL, text NOT NULL,"
    " owner TEXT NOT NULL, PRIMARY KEY (identity, text)) WITHOUT ROWID",
)


class Entry(NamedTuple):
    """What the memory holds for one text.

    Attributes:
        translation: the engine's answer.
        attempts: how often the engine was asked.
        checked: version of the checks that were made, "" for none.
        suspicions: names of the checks that found something.
    """

    translation: str
    attempts: int
    checked: str
    suspicions: tuple[str, ...]


def default_path() -> Path:
    """Where the memory lies unless the user says otherwise."""
    return cache_root() / "translation" / "memory.sqlite"


def encode(text: str) -> str | bytes:
    """A text as SQLite can keep it: itself, or bytes where it has lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def decode(data: str | bytes) -> str:
    """The inverse of `encode`."""
    return data if isinstance(data, str) else data.decode("utf-8", "surrogatepass")


class Memory:
    """One process's connection to the memory; a context manager.

    Used by one thread. The process may die at any moment: what was stored stays.

    Args:
        path: the SQLite file, made with its folder where missing.

    Attributes:
        path: see above.

    Raises:
        TranslationError: the file is no translation memory, is damaged or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._owner = uuid.uuid4().hex
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_other_files(path)
            self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        execute = self._connection.execute
        self._switch_to_wal()
        # A killed process loses nothing in NORMAL mode; a power cut may lose the last moments.
        execute("PRAGMA synchronous = NORMAL")
        execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        version = execute("PRAGMA user_version").fetchone()[0]
        tables = execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != _FORMAT and (version or tables):
            raise TranslationError(
                f"{self.path}: not a translation memory of this version of clseave; "
                "choose another file with --memory."
            )
        with self._writing():
            for statement in _SCHEMA:
                execute(statement)
            execute(f"PRAGMA user_version = {_FORMAT}")

    def _switch_to_wal(self) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # While another process makes the switch, SQLite does not wait but says so.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up all claims and closes the file."""
        try:
            if self._lock is not None:
                with self._writing():
                    self._connection.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
                self._owner_file(self._owner).unlink(missing_ok=True)
                self._lock.close()
        finally:
            self._connection.close()

    def identity_id(self, identity: Identity) -> int:
        """The number under which the memory keeps an identity."""
        values = (
            identity.engine, identity.model, identity.revision, identity.settings,
            identity.source, identity.target,
        )  # fmt: skip
        with self._writing():
            self._connection.execute(
                "INSERT OR IGNORE INTO identities"
                " (engine, model, revision, settings, source, target) VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
        row = self._connection.execute(
            "SELECT id FROM identities WHERE engine = ? AND model = ? AND revision = ?"
            " AND settings = ? AND source = ? AND target = ?",
            values,
        ).fetchone()
        return int(row[0])

    def find(self, identity: int, texts: Iterable[str]) -> dict[str, Entry]:
        """What the memory holds of `texts`."""
        found: dict[str, Entry] = {}
        with self._errors():
            for keys in _chunks([encode(text) for text in texts]):
                rows = self._connection.execute(
                    "SELECT text, translation, attempts, checked, suspicions FROM translations"
                    f" WHERE identity = ? AND text IN ({','.join('?' * len(keys))})",
                    (identity, *keys),
                )
                for text, translation, attempts, checked, suspicions in rows:
                    marks = tuple(suspicions.split()) if suspicions else ()
                    if type(text) is bytes:
                        text = decode(text)
                    if type(translation) is bytes:
                        translation = decode(translation)
                    found[text] = Entry(translation, attempts, checked, marks)
        return found

    def store(self, identity: int, entries: Iterable[tuple[str, Entry]]) -> None:
        """Keeps translations, replacing older ones, and lifts this process's claims on them."""
        rows = [
            (identity, encode(text), encode(entry.translation), entry.attempts, entry.checked,
             " ".join(entry.suspicions))
            for text, entry in entries
        ]  # fmt: skip
        with self._writing():
            self._connection.executemany(
                "INSERT OR REPLACE INTO translations VALUES (?, ?, ?, ?, ?, ?)", rows
            )
            self._release([(identity, row[1]) for row in rows])

    def claim(self, identity: int, texts: Sequence[str], attempts: int) -> set[str]:
        """Claims texts for this process to have translated.

        Args:
            identity: see `identity_id`.
            texts: what the process would like to ask for.
            attempts: how often each will then have been asked for; what the memory holds with as
                many attempts is not granted.

        Returns:
            the texts that are now this process's. The others are in the memory already, or being
            translated by another living process.
        """
        self._come_alive()
        granted: set[str] = set()
        with self._writing():
            execute = self._connection.execute
            alive: dict[str, bool] = {self._owner: False}  # its own claims are no obstacle
            for text in texts:
                key = (identity, encode(text))
                known = execute(
                    "SELECT attempts FROM translations WHERE identity = ? AND text = ?", key
                ).fetchone()
                if known is not None and known[0] >= attempts:
                    continue
                claimed = execute(
                    "SELECT owner FROM claims WHERE identity = ? AND text = ?", key
                ).fetchone()
                if claimed is not None:
                    owner = claimed[0]
                    if owner not in alive:
                        alive[owner] = self._is_alive(owner)
                    if alive[owner]:
                        continue
                execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (*key, self._owner))
                granted.add(text)
        return granted

    def release(self, identity: int, texts: Iterable[str]) -> None:
        """Gives up claims on texts that were not translated after all."""
        with self._writing():
            self._release([(identity, encode(text)) for text in texts])

    def _release(self, keys: list[tuple[int, str | bytes]]) -> None:
        self._connection.executemany("DELETE FROM claims WHERE identity = ? AND text = ?", keys)

    # An owner is alive as long as somebody holds the lock on its file: the kernel lets go of it
    # when the process ends, and neither a reused process id nor a container can deceive it.

    def _owner_file(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}-owner-{owner}")

    def _come_alive(self) -> None:
        if self._lock is not None:
            return
        with self._errors():
            for path in self.path.parent.glob(f"{self.path.name}-owner-*"):
                self._is_alive(path.name.rpartition("-")[2])  # sweeps up after killed processes
            while self._lock is None:
                stream = self._owner_file(self._owner).open("w")
                fcntl.flock(stream, fcntl.LOCK_EX)
                if self._owner_file(self._owner).exists():
                    self._lock = stream
                else:  # swept up between the two lines by another process
                    stream.close()

    def _is_alive(self, owner: str) -> bool:
        path = self._owner_file(owner)
        try:
            with path.open("r") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        path.unlink(missing_ok=True)
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.rollback()
                raise
            self._connection.commit()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explain(str(error)) from error
        except OSError as error:
            raise TranslationError(
                f"{self.path}: cannot be opened ({error.strerror}); "
                "choose another file with --memory."
            ) from error

    def _explain(self, said: str) -> ClseaveError:
        if "full" in said:
            advice = "free some space and run the same command again; nothing stored is lost."
        elif "locked" in said or "busy" in said:
            advice = f"another process has kept it locked for {_BUSY_SECONDS:.0f} s; try again."
        elif "readonly" in said or "unable to open" in said:
            advice = "choose another file with --memory."
        else:
            advice = "the file is damaged; move it away, or choose another with --memory."
        return TranslationError(f"{self.path}: the translation memory fails ({said}): {advice}")


def _refuse_other_files(path: Path) -> None:
    # SQLite takes a file of a few bytes for an empty database, and would write over it.
    if path.exists():
        with path.open("rb") as stream:
            start = stream.read(16)
        if start and start != b"SQLite format 3\0":
            raise TranslationError(
                f"{path}: not a translation memory; choose another file with --memory."
            )


def _chunks(keys: list[str | bytes]) -> Iterator[list[str | bytes]]:
    for start in range(0, len(keys), _MAX_VARIABLES):
        yield keys[start : start + _MAX_VARIABLES]
