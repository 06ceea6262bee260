"""What the memory holds for the rows of a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clseave_cli.core.data.text_files import Row, TextFile
from clseave_cli.core.translation.driver import MAX_ATTEMPTS
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks
from clseave_cli.core.translation.segments import needs_translation
from clseave_cli.errors import DataError

_ROWS_AT_ONCE = 10_000

Known = list[tuple[Row, Entry | None]]


class Terms(NamedTuple):
    """How a run's rows are looked up: plain values, so that another process can be told them.

    Attributes:
        identity: the engine's number in the memory, see `Memory.identity_id`.
        source: canonical code of the language translated from.
        target: canonical code of the language translated into.
        by_pair_id: the memory knows rows by their `pairID` instead of by their text.
        exact: texts go to the engine as they are, even those without a letter.
        retries_suspect: a suspect translation asked for once only is not final.
    """

    identity: int
    source: str
    target: str
    by_pair_id: bool
    exact: bool
    retries_suspect: bool


class Lookup:
    """Finds the rows of one file in the memory.

    Args:
        memory: where to look.
        path: the file, for messages.
        terms: how to look.
    """

    def __init__(self, memory: Memory, path: Path, terms: Terms) -> None:
        self._memory = memory
        self._path = path
        self._terms = terms
        self._checks = Checks(terms.source, terms.target)

    def chunks(self, file: TextFile) -> Iterator[Known]:
        """The rows in pieces, each row with what the memory holds for it."""
        rows = file.rows()
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            keys = [self.key(row) for row in chunk]
            entries = self._memory.find(
                self._terms.identity, {key for key in keys if key is not None}
            )
            yield [
                (row, self._unchanged(row) if key is None else entries.get(key))
                for row, key in zip(chunk, keys, strict=True)
            ]

    def key(self, row: Row) -> str | None:
        """What the memory knows a row by; None for a text that needs no translation."""
        if self._terms.by_pair_id:
            if row.pair_id is None:
                raise DataError.at(
                    self._path, row.line, "no pairID to find the translation by; try --match text."
                )
            return row.pair_id
        return row.text if self._terms.exact or needs_translation(row.text) else None

    def _unchanged(self, row: Row) -> Entry:
        suspicions = () if row.text.strip() else ("empty",)
        return Entry(row.text, 0, self._checks.version, suspicions)

    def is_final(self, entry: Entry) -> bool:
        """Whether an entry is to be written as it is rather than asked for once more."""
        asked_once = 0 < entry.attempts < MAX_ATTEMPTS
        return not (self._terms.retries_suspect and entry.suspicions and asked_once)

    def is_complete(self, chunk: Known) -> bool:
        """Whether every row of a piece can be written."""
        return all(entry is not None and self.is_final(entry) for _, entry in chunk)

    def checked(self, chunk: Known) -> Known:
        """The chunk, with the checks made where the memory holds none of this version."""
        version = self._checks.version
        if all(entry is None or entry.checked == version for _, entry in chunk):
            return chunk
        checked: Known = []
        renewed: dict[str, Entry] = {}
        for row, entry in chunk:
            if entry is not None and entry.checked != version:
                found = self._checks.find(row.text, entry.translation)
                entry = entry._replace(checked=version, suspicions=found)
                renewed[row.text] = entry
            checked.append((row, entry))
        # Known by its pairID, a translation may belong to rows of different texts.
        if not self._terms.by_pair_id:
            self._memory.store(self._terms.identity, renewed.items())
        return checked
