"""JSON Lines: a row's bytes stay as they are, except for the value that is translated."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from clseave_cli.core.data.text_files import SUSPECT_FIELD, Row, choose_field, reading
from clseave_cli.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class Span(NamedTuple):
    """Some consecutive lines of a file.

    Attributes:
        start: where the first one begins, in bytes.
        first_line: its number, from 1.
        num_lines: how many there are.
    """

    start: int
    first_line: int
    num_lines: int


class JsonLinesFile:
    """A `.jsonl` file, packed or not.

    Args:
        path: the file.
        field: the key to translate; None for the first known one in the first row.
        source: language of the text.
        span: the part of an unpacked file that is meant; None for all of it.
    """

    marks_rows = True

    def __init__(
        self, path: Path, field: str | None, source: str, span: Span | None = None
    ) -> None:
        self._path = path
        self._field = field
        self._source = source
        self._span = span
        if field is None:
            next(self.rows(), None)  # the first row tells

    @property
    def field(self) -> str:
        """The key to translate; empty where no row has told it."""
        return self._field or ""

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """The lines with their numbers."""
        if self._span is None:
            return enumerate(stream, 1)
        stream.seek(self._span.start)
        return enumerate(itertools.islice(stream, self._span.num_lines), self._span.first_line)

    def rows(self) -> Iterator[Row]:
        """The rows; blank lines are passed over. A row's record is its line and its values."""
        field: Any = self._field  # None, which is no key, until the first row has told
        with reading(self._path) as stream:
            for number, line in self._lines(stream):
                try:
                    values = orjson.loads(line)
                    text = values[field]
                    if type(text) is not str:
                        raise TypeError
                except (ValueError, TypeError, KeyError):
                    # Anything but the plainest of rows is looked at again, with more patience.
                    if line.isspace():
                        continue
                    line, values = self._parse(number, line)
                    field = self._field
                    text = values[field]
                pair_id = values.get("pairID")
                if pair_id is not None and type(pair_id) is not str:
                    pair_id = str(pair_id)
                yield Row(number, text, pair_id, (line, values))

    def _parse(self, number: int, data: bytes) -> tuple[bytes, dict[str, Any]]:
        """The line and its values, or an error that says what is wrong with it."""
        line = data.removeprefix(_BOM) if number == 1 else data
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError:
            raise DataError.at(self._path, number, "not UTF-8; convert the file.") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError.at(
                self._path, number, f"not valid JSON ({error}); expected one object a line."
            ) from None
        if not isinstance(values, dict):
            raise DataError.at(self._path, number, 'expected an object: {"sentence2": "…", …}.')
        if self._field is None:
            self._field = choose_field(self._path, None, list(values))
        text = values.get(self._field)
        if not isinstance(text, str):
            found = "is missing" if self._field not in values else f"is {json.dumps(text)[:40]}"
            raise DataError.at(self._path, number, f'"{self._field}" {found}; expected a string.')
        return line, values

    def writer(self, stream: BinaryIO) -> JsonLinesWriter:
        """Writes such a file."""
        return JsonLinesWriter(stream, self.field, self._source)


class JsonLinesWriter:
    """Writes rows back with the value replaced, and the source and the marks added at the end."""

    def __init__(self, stream: BinaryIO, field: str, source: str) -> None:
        self._stream = stream
        self._field = field
        self._key = f'"{field}"'.encode()
        self._opening = f'"{field}": "'.encode()
        self._source_field = f"{field}_{source}"
        self._source_key = f", {_quote(self._source_field).decode()}: ".encode()

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes one line."""
        line, values = row.record
        start, end = self._span(line, row.text)
        close = line.rindex(b"}")
        added = b""
        if self._source_field not in values:
            added = self._source_key + line[start:end]
        if suspicions:
            added += f', "{SUSPECT_FIELD}": {json.dumps(suspicions)}'.encode()
        if added and line[close - 1 : close].isspace():
            close = len(line[:close].rstrip())
        rest = line[close:] if line.endswith(b"\n") else line[close:] + b"\n"
        self._stream.write(
            b"%b%b%b%b%b" % (line[:start], _quote(translation), line[end:close], added, rest)
        )

    def _span(self, line: bytes, text: str) -> tuple[int, int]:
        """Where the field's value stands in the line, its quotes included."""
        # Nearly every row is flat, names the field once and holds the text without escapes. Then
        # the name can be neither in a string (its quotes would be escaped) nor in an inner object.
        quoted = _quote(text)
        start = line.find(self._opening) + len(self._opening) - 1
        if (
            start >= len(self._opening) - 1
            and line.startswith(quoted, start)
            and line.count(b"{") == 1
            and line.count(self._key) == 1
        ):
            return start, start + len(quoted)
        return _search(line, self._field)

    def leave_out(self, row: Row) -> None:
        """Rows are joined by their keys: one may be missing."""

    def close(self) -> None:
        """Every line is written already."""


def _quote(text: str) -> bytes:
    """A text as JSON writes it; a lone surrogate has no UTF-8, but an escape."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()


def _search(data: bytes, field: str) -> tuple[int, int]:
    """The span of a key's value among the line's outermost keys; of the last, as parsers do."""
    line = data.decode()

    def skip(at: int) -> int:
        return _SPACE.match(line, at).end()  # type: ignore[union-attr]

    span = (0, 0)
    at = skip(skip(0) + 1)
    while line[at] != "}":
        key, at = _DECODER.raw_decode(line, at)
        start = skip(skip(at) + 1)
        _, at = _DECODER.raw_decode(line, start)
        if key == field:
            span = start, at
        at = skip(at)
        if line[at] == ",":
            at = skip(at + 1)
    start, end = span
    return len(line[:start].encode()), len(line[:end].encode())
