"""Files of texts to translate: read row by row, and written with everything else unchanged."""

from __future__ import annotations

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from clseave_cli.core.data.rows import (
    HYPOTHESIS_KEYS,
    ID_KEYS,
    NOT_UTF8,
    PARQUET_BATCH,
    SUSPECT_FIELD,
    BadRow,
    DelimitedRows,
    first_value,
    format_of,
    is_garbled,
    json_rows,
    reading,
    reading_parquet,
    short,
    text_lines,
)
from clseave_cli.errors import DataError

#: Fields of the text, unless the user chooses one; the first one present is used.
FIELDS = (*HYPOTHESIS_KEYS, "text")

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
#: Maximum size of a row group of a translated Parquet file.
_GROUP_ROWS, _GROUP_BYTES = 20_000, 64 << 20


class Row(NamedTuple):
    """One row of a file."""

    line: int  # number of the line it starts on, or of the row in a Parquet file; from 1
    text: str  # to translate
    pair_id: str | None  # the row's `pairID`, if it has one
    record: Any  # the row, in the form that the writer needs


#: Writes a row with its translation, and the reasons why that is suspect if the format allows.
Write = Callable[[Row, str, tuple[str, ...]], None]


class TextFile(ABC):
    """A file of one of the formats; see `open_text_file`.

    Attributes:
        marks_rows: whether a row can be marked as suspect. If not (plain text), every line keeps
            its place, and a row without a translation becomes an empty line.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self.path, self._field, self._source = path, field, source

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            DataError: a row cannot be read; names file and line.
        """

    @abstractmethod
    def writer(self, stream: BinaryIO) -> AbstractContextManager[Write]:
        """A function that writes rows to a stream in the same format; leaves the stream open."""

    def _choose_field(self, names: list[str]) -> str:
        """The field to translate, of those that the file has.

        Raises:
            DataError: the file does not have it, or is not UTF-8.
        """
        candidates = FIELDS if self._field is None else (self._field,)
        for name in candidates:
            if name in names:
                return name
        if is_garbled(names):
            raise DataError.at(self.path, 1, NOT_UTF8)
        raise DataError(
            f"{self.path}: no field {' or '.join(candidates)}; the fields are "
            f"{', '.join(names) or 'none'}. Choose one with --field."
        )


def open_text_file(path: Path, field: str | None, source: str) -> TextFile:
    """Opens `.jsonl`, `.csv`, `.tsv`, `.txt` (each also with `.gz`) or `.parquet`.

    The text is in `field` (None: the first of `FIELDS` that exists). Its language, `source`, names
    the field for the source sentence (`sentence2_en`).

    Raises:
        DataError: there is no such file or field.
        UsageError: no format has this extension.
    """
    kind = format_of(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    kinds: dict[str, Callable[[Path, str | None, str], TextFile]] = {
        "jsonl": _JsonLinesFile, "csv": _DelimitedFile, "plain": _PlainFile,
        "parquet": _ParquetFile,
    }  # fmt: skip
    return kinds[kind](path, field, source)


def _pair_id(values: dict[str, Any]) -> str | None:
    value = first_value(values, ID_KEYS)
    return value if value is None or type(value) is str else str(value)


class _JsonLinesFile(TextFile):
    """Leaves the bytes of a row unchanged, except for the translated value.

    A row's record is its line and its values.
    """

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        super().__init__(path, field, source)
        if field is None:
            next(self.rows(), None)  # the first row determines the field

    def rows(self) -> Iterator[Row]:
        with reading(self.path) as stream:
            for number, values, line in json_rows(stream):
                if isinstance(values, BadRow):
                    raise DataError.at(self.path, number, str(values))
                if self._field is None:
                    self._field = self._choose_field(list(values))
                text = values.get(self._field)
                if type(text) is not str:
                    problem = f"is {short(text)}" if self._field in values else "is missing"
                    raise DataError.at(
                        self.path, number, f'"{self._field}" {problem}; expected a string.'
                    )
                yield Row(number, text, _pair_id(values), (line, values))

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """Source sentence and marks are added at the end of a row."""
        field = self._field or ""  # unknown, and not needed, if the file has no rows
        key, source_field = _quote(field), f"{field}_{self._source}"
        source_key = b", " + _quote(source_field) + b": "

        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            line, values = row.record
            quoted = _quote(row.text)
            start = line.find(key + b": " + quoted) + len(key) + 2
            end = start + len(quoted)
            # Most rows are flat and have the key once. It cannot be inside a string, where its
            # quotes would be escaped.
            if start < len(key) + 2 or line.count(key) > 1 or line.count(b"{") > 1:
                start, end = _search(line, field)
            close = line.rindex(b"}")
            added = b"" if source_field in values else source_key + line[start:end]
            if suspicions:
                added += f', "{SUSPECT_FIELD}": {json.dumps(suspicions)}'.encode()
            if added and line[close - 1 : close].isspace():
                close = len(line[:close].rstrip())
            rest = line[close:] if line.endswith(b"\n") else line[close:] + b"\n"
            stream.write(
                b"%b%b%b%b%b" % (line[:start], _quote(translation), line[end:close], added, rest)
            )

        yield write


def _quote(text: str) -> bytes:
    """A text in JSON; a lone surrogate, which has no UTF-8, is escaped."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()


def _search(data: bytes, field: str) -> tuple[int, int]:
    """The span of a top-level key's value; of the last such key, as in JSON parsers."""
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


class _DelimitedFile(TextFile):
    """CSV or TSV with a header; a row's record is its cells."""

    def rows(self) -> Iterator[Row]:
        with reading(self.path) as stream:
            records = DelimitedRows(stream)
            column = records.header.index(self._choose_field(records.header))
            for number, values, cells in records:
                if isinstance(values, BadRow):
                    raise DataError.at(self.path, number, str(values))
                yield Row(number, cells[column], _pair_id(values), cells)

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """Keeps delimiter, line ends and quoting; appends columns for source and suspicions."""
        with reading(self.path) as lines:
            records = DelimitedRows(lines)
        line, header = records.first_line, records.header
        cells = line.decode("utf-8-sig", "replace").strip().split(records.delimiter)
        quotes_all = all(cell.startswith('"') and cell.endswith('"') for cell in cells)
        encoding = "utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8"
        text = io.TextIOWrapper(stream, encoding, newline="")
        out = csv.writer(
            text,
            delimiter=records.delimiter,
            lineterminator="\r\n" if line.endswith(b"\r\n") else "\n",
            quoting=csv.QUOTE_ALL if quotes_all else csv.QUOTE_MINIMAL,
        )
        field = self._choose_field(header)
        column, source_field = header.index(field), f"{field}_{self._source}"
        added = [] if source_field in header else [source_field]
        out.writerow([*header, *added, SUSPECT_FIELD])

        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            cells = [*row.record, *([row.text] if added else []), " ".join(suspicions)]
            cells[column] = translation
            out.writerow(cells)

        try:
            yield write
        finally:
            text.detach()


class _PlainFile(TextFile):
    """A sentence a line, empty lines included; a row's record is its line break."""

    marks_rows = False

    def rows(self) -> Iterator[Row]:
        for number, line in text_lines(self.path):
            text = line.removesuffix("\n").removesuffix("\r")
            yield Row(number, text, None, line[len(text) :])

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            # A line break in a translation would shift all lines below.
            line = " ".join(translation.splitlines()) if row.text != translation else translation
            stream.write((line + row.record).encode("utf-8", "replace"))

        yield write


class _ParquetFile(TextFile):
    """A row's record is its batch and its index there."""

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        import pyarrow

        super().__init__(path, field, source)
        with reading_parquet(path, path) as file:
            self._schema, groups = file.schema_arrow, file.metadata
        kind = groups.row_group(0).column(0).compression if groups.num_row_groups else "SNAPPY"
        self._compression = "NONE" if kind == "UNCOMPRESSED" else kind
        self._column = self._choose_field(self._schema.names)
        kind = self._schema.field(self._column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {self._column} is {kind}; expected strings.")

    def rows(self) -> Iterator[Row]:
        keys = [name for name in (self._column, *ID_KEYS) if name in self._schema.names]
        number = 0
        with reading_parquet(self.path, self.path) as file:
            for batch in file.iter_batches(PARQUET_BATCH):
                for index, values in enumerate(batch.select(keys).to_pylist()):
                    number += 1
                    text = values[self._column]
                    if text is None:
                        raise DataError.at(
                            self.path, number, f"{self._column} is null; expected a string."
                        )
                    yield Row(number, text, _pair_id(values), (batch, index))

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """Appends columns for source and suspicions."""
        import pyarrow
        import pyarrow.parquet

        source_field = f"{self._column}_{self._source}"
        schema = self._schema
        if source_field not in schema.names:
            schema = schema.append(pyarrow.field(source_field, pyarrow.string()))
        schema = schema.append(pyarrow.field(SUSPECT_FIELD, pyarrow.list_(pyarrow.string())))
        group: list[tuple[str, str, list[str]]] = []
        batches: list[tuple[Any, list[int]]] = []  # with the indices of the rows to write
        num_bytes = 0

        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            nonlocal num_bytes
            batch, index = row.record
            if not batches or batches[-1][0] is not batch:
                batches.append((batch, []))
                num_bytes += batch.nbytes
            batches[-1][1].append(index)
            group.append((row.text, translation, list(suspicions)))
            if len(group) >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
                write_group()

        def write_group() -> None:
            nonlocal num_bytes
            if group:
                taken = [batch.take(pyarrow.array(indices)) for batch, indices in batches]
                table = pyarrow.Table.from_batches(taken)
                columns = dict(zip(table.column_names, table.columns, strict=True))
                texts, translations, suspicions = map(pyarrow.array, zip(*group, strict=True))
                columns.setdefault(source_field, texts)
                columns |= {self._column: translations, SUSPECT_FIELD: suspicions}
                arrays = [columns[part.name].cast(part.type) for part in schema]
                out.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            group.clear()
            batches.clear()
            num_bytes = 0

        out = pyarrow.parquet.ParquetWriter(stream, schema, compression=self._compression)
        with closing(out):
            yield write
            write_group()
