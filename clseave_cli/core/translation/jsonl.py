"""JSON Lines: a row's bytes stay as they are, except for the value that is translated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clseave_cli.core.translation.files import SUSPECT_FIELD, Row, choose_field, reading
from clseave_cli.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class _Record(NamedTuple):
    line: str  # without line end
    start: int  # of the value, its quotes included
    end: int
    values: dict[str, Any]
    ending: str


class JsonLinesFile:
    """A `.jsonl` file, packed or not.

    Args:
        path: the file.
        field: the key to translate; None for the first known one in the first row.
        source: language of the text.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self._path = path
        self._field = field
        self._source = source
        if field is None:
            next(self.rows(), None)  # the first row tells

    def rows(self) -> Iterator[Row]:
        """The rows; blank lines are passed over."""
        with reading(self._path) as stream:
            for number, data in enumerate(stream, 1):
                if number == 1:
                    data = data.removeprefix(_BOM)
                if not data.isspace():
                    yield self._row(number, data)

    def _row(self, number: int, data: bytes) -> Row:
        try:
            line = data.decode()
            values = json.loads(line)
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
        field = self._field
        text = values.get(field)
        if not isinstance(text, str):
            found = "is missing" if field not in values else f"is {json.dumps(text)[:40]}"
            raise DataError.at(self._path, number, f'"{field}" {found}; expected a string.')
        content = line.rstrip("\r\n")
        start, end = self._span(content, field)
        pair_id = values.get("pairID")
        record = _Record(content, start, end, values, line[len(content) :] or "\n")
        return Row(number, text, None if pair_id is None else str(pair_id), record)

    def _span(self, line: str, field: str) -> tuple[int, int]:
        """Where the field's value stands in the line."""
        # Nearly every row is flat and names the field once; then the name cannot be found in a
        # string (its quotes would be escaped there) nor in an object within.
        key = f'"{field}"'
        if line.count("{") == 1 and line.count(key) == 1:
            colon = _SPACE.match(line, line.index(key) + len(key)).end()  # type: ignore[union-attr]
            if line.startswith(":", colon):
                start = _SPACE.match(line, colon + 1).end()  # type: ignore[union-attr]
                return start, _DECODER.raw_decode(line, start)[1]
        return _search(line, field)

    def writer(self, stream: BinaryIO) -> JsonLinesWriter:
        """Writes such a file."""
        return JsonLinesWriter(stream, self._field or "", self._source)


class JsonLinesWriter:
    """Writes rows back with the value replaced, and the source and the marks added at the end."""

    def __init__(self, stream: BinaryIO, field: str, source: str) -> None:
        self._stream = stream
        self._source_field = f"{field}_{source}"
        self._source_key = json.dumps(self._source_field, ensure_ascii=False)

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes one line."""
        line, start, end, values, ending = row.record
        close = line.rindex("}")
        added = ""
        if self._source_field not in values:
            added = f", {self._source_key}: {line[start:end]}"
        if suspicions:
            added += f", {json.dumps(SUSPECT_FIELD)}: {json.dumps(list(suspicions))}"
        before = line[end:close].rstrip()
        whole = f"{line[:start]}{_quote(translation)}{before}{added}{line[close:]}{ending}"
        self._stream.write(whole.encode())

    def leave_out(self, row: Row) -> None:
        """Rows are joined by their keys: one may be missing."""

    def close(self) -> None:
        """Every line is written already."""


def _quote(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    try:
        quoted.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but an escape
        return json.dumps(text)
    return quoted


def _search(line: str, field: str) -> tuple[int, int]:
    """The span of a key's value among the line's outermost keys; of the last, as parsers do."""

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
    return span
