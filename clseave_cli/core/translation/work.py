"""What is still to be translated and what could not be: on disk, whatever its size."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from clseave_cli.core.translation.memory import decode, encode


class Item(NamedTuple):
    """One text to ask for; `attempt` as in `Engine.translate`."""

    text: str
    attempt: int


class Work:
    """A queue of texts without duplicates, in SQLite's private temporary file.

    Args:
        by_length: the longest first; otherwise in the order they came.
    """

    def __init__(self, by_length: bool) -> None:
        self._connection = sqlite3.connect("", isolation_level=None)
        self._connection.executescript(
            "CREATE TABLE items (id INTEGER PRIMARY KEY, text BLOB UNIQUE, characters INTEGER,"
            " attempt INTEGER, waiting INTEGER DEFAULT 0);"
            "CREATE TABLE failures (text BLOB PRIMARY KEY, reason TEXT) WITHOUT ROWID;"
        )
        self._order = "id"
        if by_length:
            self._order = "characters DESC, id"
            self._connection.execute("CREATE INDEX by_length ON items (characters DESC, id)")
        self.num_texts = 0
        self.num_characters = 0

    def close(self) -> None:
        """Gives the disk space back."""
        self._connection.close()

    def add(self, items: Iterable[Item]) -> None:
        """Queues texts; those already in the queue are counted once."""
        execute = self._connection.execute
        execute("BEGIN")
        for text, attempt in items:
            added = execute(
                "INSERT OR IGNORE INTO items (text, characters, attempt) VALUES (?, ?, ?)",
                (encode(text), len(text), attempt),
            ).rowcount
            if added:
                self.num_texts += 1
                self.num_characters += len(text)
        execute("COMMIT")

    def take(self, count: int) -> list[Item]:
        """Removes and returns the next texts, at most `count`."""
        return self._take("waiting = 0", count)

    def postpone(self, items: Iterable[Item]) -> None:
        """Puts texts aside that another process is having translated."""
        self._connection.executemany(
            "INSERT INTO items (text, characters, attempt, waiting) VALUES (?, ?, ?, 1)",
            [(encode(item.text), len(item.text), item.attempt) for item in items],
        )

    def take_postponed(self, count: int) -> list[Item]:
        """Removes and returns texts put aside, at most `count`."""
        return self._take("waiting = 1", count)

    def _take(self, condition: str, count: int) -> list[Item]:
        rows = self._connection.execute(
            f"SELECT id, text, attempt FROM items WHERE {condition} ORDER BY {self._order} LIMIT ?",
            (count,),
        ).fetchall()
        self._connection.executemany("DELETE FROM items WHERE id = ?", [(row[0],) for row in rows])
        return [Item(decode(text), attempt) for _, text, attempt in rows]

    def fail(self, text: str, reason: str) -> None:
        """Notes that a text will not be translated in this run."""
        self._connection.execute(
            "INSERT OR REPLACE INTO failures VALUES (?, ?)", (encode(text), reason)
        )

    def reason(self, text: str) -> str | None:
        """Why a text was not translated; None where nothing was noted."""
        row = self._connection.execute(
            "SELECT reason FROM failures WHERE text = ?", (encode(text),)
        ).fetchone()
        return None if row is None else str(row[0])
