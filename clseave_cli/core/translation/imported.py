"""Translations that exist already, brought in from a file by `pairID` or by source text."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.text_files import FIELDS, reading, split_name
from clseave_cli.core.files import file_digest
from clseave_cli.core.translation.engine import Identity, Limits, Rejection
from clseave_cli.core.translation.memory import decode, encode
from clseave_cli.errors import DataError, UsageError

_BATCH_SIZE = 1_000
_PAIR_ID = "pairID"
_SOURCE_NAMES = ("source", "text")


class ImportedEngine:
    """A file of translations, indexed on disk.

    A `.tsv` has two columns, what a row is known by and its translation, under a header
    (`pairID`, `source` or `text` first) or none. A `.jsonl` has `pairID`, or the source text as
    `source`, `text` or `sentence2_en`; and the translation as `translation`, or under the name of
    the translated field.
    """

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        if config.translations is None:
            raise UsageError("--translations is missing: in which file are the translations?")
        path = Path(str(config.translations).replace("{lang}", target))
        if not path.is_file():
            raise DataError(f"{path}: no such file; --translations names the translations.")
        self._path = path
        self._config = config
        self._source = source
        self._match: str | None = None if config.match == "auto" else config.match
        self._index = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._index.execute("CREATE TABLE found (key BLOB PRIMARY KEY, translation BLOB)")
        try:
            self._read()
        except BaseException:
            self._index.close()
            raise
        by_pair_id = self._match == _PAIR_ID
        self.licence = f"translations from {path}: their own licence applies"
        self.identity = Identity(
            "file", path.name, file_digest(path)[:16], f"match={self._match}", source, target
        )
        self.limits = Limits(
            batch_size=_BATCH_SIZE,
            batch_characters=1 << 30,
            text_characters=None,
            concurrency=1,
            by_pair_id=by_pair_id,
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Looks each text, or pairID, up."""
        answers = []
        for text in texts:
            row = self._index.execute(
                "SELECT translation FROM found WHERE key = ?", (encode(text),)
            ).fetchone()
            if row is None:
                raise Rejection(f"{self._path} has no translation for it")
            answers.append(decode(row[0]))
        return answers

    def close(self) -> None:
        """Gives the index's disk space back."""
        self._index.close()

    def _read(self) -> None:
        ending = split_name(self._path)[1].removesuffix(".gz")
        if ending not in (".tsv", ".jsonl"):
            raise UsageError(f"--translations {self._path}: expected a .tsv or .jsonl file.")
        pairs = self._tsv() if ending == ".tsv" else self._jsonl()
        execute = self._index.execute
        execute("BEGIN")
        for line, key, translation in pairs:
            data = (encode(key), encode(translation))
            if execute("INSERT OR IGNORE INTO found VALUES (?, ?)", data).rowcount:
                continue
            # One sentence may be translated in two ways, of which the first is as good; one row
            # may not.
            known = execute("SELECT translation FROM found WHERE key = ?", data[:1]).fetchone()
            if self._match == _PAIR_ID and known[0] != data[1]:
                raise DataError.at(
                    self._path, line, f"a second, different translation for pairID {key}."
                )
        execute("COMMIT")

    def _lines(self) -> Iterator[tuple[int, str]]:
        with reading(self._path) as stream:
            for number, data in enumerate(stream, 1):
                try:
                    line = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    raise DataError.at(self._path, number, "not UTF-8; convert the file.") from None
                if line:
                    yield number, line

    def _tsv(self) -> Iterator[tuple[int, str, str]]:
        for number, line in self._lines():
            cells = line.split("\t")
            if len(cells) != 2:
                raise DataError.at(
                    self._path, number,
                    f"{len(cells)} columns; expected two: pairID or source text, and translation.",
                )  # fmt: skip
            if number == 1 and cells[0] in (_PAIR_ID, *_SOURCE_NAMES):
                if self._match is None:
                    self._match = _PAIR_ID if cells[0] == _PAIR_ID else "text"
                continue
            self._match = self._match or "text"
            yield number, cells[0], cells[1]

    def _jsonl(self) -> Iterator[tuple[int, str, str]]:
        for number, line in self._lines():
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError.at(self._path, number, f"not valid JSON ({error}).") from None
            if not isinstance(values, dict):
                raise DataError.at(self._path, number, "expected an object a line.")
            if self._match is None:
                self._match = _PAIR_ID if _PAIR_ID in values else "text"
            fields = (self._config.field,) if self._config.field else FIELDS
            sources = (*(f"{name}_{self._source}" for name in fields), *_SOURCE_NAMES)
            keys = (_PAIR_ID,) if self._match == _PAIR_ID else sources
            key = self._value(number, values, keys)
            yield number, key, self._value(number, values, ("translation", *fields))

    def _value(self, number: int, values: dict[str, Any], names: Sequence[str]) -> str:
        for name in names:
            if isinstance(values.get(name), str):
                return str(values[name])
        raise DataError.at(self._path, number, f"none of the strings {', '.join(names)} in it.")


def create(config: TranslateConfig, source: str, target: str) -> ImportedEngine:
    """The engine, for `create_engine`."""
    return ImportedEngine(config, source, target)
