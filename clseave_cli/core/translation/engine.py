"""The interface of translation engines, their errors and names, and the simplest: `file`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.rows import BadRow, read_rows, split_name, text_lines
from clseave_cli.core.data.text_files import FIELDS
from clseave_cli.core.files import file_digest
from clseave_cli.errors import DataError, TranslationError, UsageError

#: Third parties register `name = "package.module:create"` under this entry-point group.
ENTRY_POINT_GROUP = "clseave.translation_engines"

_BUILT_IN = {
    "nmt": "clseave_cli.core.translation.nmt:NmtEngine",
    "google": "clseave_cli.core.translation.web:GoogleEngine",
    "libre": "clseave_cli.core.translation.web:LibreEngine",
    "file": "clseave_cli.core.translation.engine:ImportedEngine",
}

_IMPORT_BATCH_SIZE = 1_000
_PAIR_ID = "pairID"
_SOURCE_NAMES = ("source", "text")


class Fault(TranslationError):
    """A request failed and is retried, after `retry_after` seconds if the service names them."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Refusal(Fault):
    """The service refuses us, not this text: 429, 403, a captcha. Many in a row end the run."""


class Unreachable(Refusal):
    """Nothing answers at the address. The run ends at once if nothing ever did."""


class Rejection(TranslationError):
    """This text cannot be translated, and a retry would not help."""


@dataclass(frozen=True)
class Identity:
    """What a translation depends on besides the text; the memory's key."""

    engine: str
    model: str  # the model or service
    revision: str  # version of the model; "" if the service does not publish one
    settings: str  # other options that change translations (beams, precision); "" for none
    source: str  # canonical code of the source language
    target: str  # canonical code of the target language


@dataclass(frozen=True)
class Limits:
    """How to call an engine."""

    batch_size: int  # texts in one call
    batch_characters: int  # characters in one call; a longer text is sent alone
    #: Characters in one text: longer ones are split at sentence ends, and all at line breaks.
    #: None: texts are sent unchanged.
    text_characters: int | None
    concurrency: int  # calls in flight at a time
    requests_per_second: float | None = None  # the default rate; None: unlimited
    by_pair_id: bool = False  # the engine translates `pairID`s instead of texts


class Engine(Protocol):
    """A translator from one language into another.

    Attributes:
        identity: the key of its translations in the memory.
        limits: how to call it.
        licence: what the translations may be used for, in one line.
    """

    identity: Identity
    limits: Limits
    licence: str

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Translates each text; several threads call it if `limits.concurrency` > 1.

        Args:
            texts: non-empty, without line breaks and control characters.
            attempt: 0, or 1 if the first answer failed a quality check; the engine should then
                decode differently if it can.

        Returns:
            One translation for each text, in order.

        Raises:
            Fault: retry later.
            Rejection: one of the texts cannot be translated.
            TranslationError: nothing can be translated; the run ends.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""


Create = Callable[[TranslateConfig, str, str], Engine]


def find_engine(name: str) -> Create:
    """The function that creates the engine `name`; raises a UsageError if there is none."""
    built_in = [EntryPoint(*item, ENTRY_POINT_GROUP) for item in _BUILT_IN.items()]
    plug_ins = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    # Built-in names come first, and plug-ins cannot override them.
    points = {point.name: point for point in (*built_in, *plug_ins, *built_in)}
    if name not in points:
        raise UsageError(f"--engine {name}: no such engine; choose from {', '.join(points)}.")
    create: Create = points[name].load()
    return create


def create_engine(config: TranslateConfig, source: str, target: str) -> Engine:
    """The engine of `config`, for canonical `source` and `target` languages."""
    return find_engine(config.engine)(config, source, target)


class ImportedEngine:
    """A file of translations, indexed on disk; docs/translate.md describes its two formats."""

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        if config.translations is None:
            raise UsageError("--translations is missing: name the file of translations.")
        self._path = path = Path(str(config.translations).replace("{lang}", target))
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --translations.")
        if split_name(path)[1].removesuffix(".gz") not in (".tsv", ".jsonl"):
            raise UsageError(f"--translations {path}: expected a .tsv or .jsonl file.")
        self._match: str | None = None if config.match == "auto" else config.match
        self._index = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._index.execute("CREATE TABLE translations (key BLOB PRIMARY KEY, translation BLOB)")
        try:
            self._read((config.field,) if config.field else FIELDS, source)
        except BaseException:
            self._index.close()
            raise
        self.licence = f"translations from {path}: their own licence applies"
        digest = file_digest(path)[:16]
        self.identity = Identity("file", path.name, digest, f"match={self._match}", source, target)
        self.limits = Limits(
            _IMPORT_BATCH_SIZE, 1 << 30, None, concurrency=1, by_pair_id=self._match == _PAIR_ID
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Looks up each text, or pairID."""
        answers = [a for text in texts if (a := self._find(encode(text))) is not None]
        if len(answers) < len(texts):
            raise Rejection(f"{self._path} has no translation for it")
        return [answer.decode("utf-8", "surrogatepass") for answer in answers]

    def _find(self, key: bytes) -> bytes | None:
        query = "SELECT translation FROM translations WHERE key = ?"
        row = self._index.execute(query, (key,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Frees the index's disk space."""
        self._index.close()

    def _read(self, fields: Sequence[str], source: str) -> None:
        sources = (*(f"{name}_{source}" for name in fields), *_SOURCE_NAMES)
        self._index.execute("BEGIN")
        for line, values in self._rows():
            keys = (_PAIR_ID,) if self._match == _PAIR_ID else sources
            key = encode(self._value(line, values, keys))
            translation = encode(self._value(line, values, ("translation", *fields)))
            first = self._find(key)
            if first is None:
                self._index.execute("INSERT INTO translations VALUES (?, ?)", (key, translation))
            # A sentence may have several translations, of which the first is used; a row may not.
            elif self._match == _PAIR_ID and first != translation:
                name = key.decode(errors="replace")
                problem = f"a second, different translation for pairID {name}."
                raise DataError.at(self._path, line, problem)
        self._index.execute("COMMIT")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line numbers and rows; the first row decides how to match unless `--match` does."""
        is_tsv = split_name(self._path)[1].startswith(".tsv")
        for number, values, _ in () if is_tsv else read_rows(self._path, ()):
            if isinstance(values, BadRow):
                raise DataError.at(self._path, number, str(values))
            self._match = self._match or (_PAIR_ID if _PAIR_ID in values else "text")
            yield number, values
        for number, line in text_lines(self._path) if is_tsv else ():
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            if len(cells) != 2:
                problem = "columns; expected two: pairID or text, and translation."
                raise DataError.at(self._path, number, f"{len(cells)} {problem}")
            is_header = number == 1 and cells[0] in (_PAIR_ID, *_SOURCE_NAMES)
            by_pair_id = is_header and cells[0] == _PAIR_ID
            self._match = self._match or (_PAIR_ID if by_pair_id else "text")
            if not is_header:
                yield number, {self._match: cells[0], "translation": cells[1]}

    def _value(self, number: int, values: dict[str, Any], names: Sequence[str]) -> str:
        for name in names:
            if isinstance(values.get(name), str):
                return str(values[name])
        raise DataError.at(self._path, number, f"has none of the strings {', '.join(names)}.")


def encode(text: str) -> bytes:
    """A text in UTF-8, even with a lone surrogate from a JSON escape."""
    return text.encode("utf-8", "surrogatepass")
