"""Files with texts to translate: read row by row, written with everything else as it was."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from clseave_cli.core.data.rows import (
    HYPOTHESIS_KEYS,
    ID_KEYS,
    PARQUET_BATCH,
    SUSPECT_FIELD,
    BadRow,
    DelimitedRows,
    first_value,
    format_of,
    json_rows,
    packing,
    reading,
    reading_parquet,
    short,
    split_name,
)
from clseave_cli.errors import DataError

__all__ = [
    "FIELDS", "SUSPECT_FIELD", "Row", "TextFile", "Writer", "open_text_file", "packing", "reading",
    "split_name",
]  # fmt: skip

#: Fields that hold the text, where the user names none.
FIELDS = (*HYPOTHESIS_KEYS, "text")

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
#: A row group of a translated Parquet file ends at so many rows, or bytes.
_GROUP_ROWS, _GROUP_BYTES = 20_000, 64 << 20


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        line: number of the line it starts on, or of the row in a Parquet file; from 1.
        text: what is to be translated.
        pair_id: the row's `pairID`, None where it has none.
        record: the row as its format's writer wants it back.
    """

    line: int
    text: str
    pair_id: str | None
    record: Any


class Writer:
    """Writes the rows of one translated file."""

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes a row with its text replaced, and where it is marked, its suspicions."""
        raise NotImplementedError

    def leave_out(self, row: Row) -> None:
        """Takes a row there is no translation for: an empty line where lines keep their places."""

    def close(self) -> None:
        """Writes what is still held back, and leaves the stream open."""


class TextFile:
    """A file of one of the formats.

    Args:
        path: the file.
        field: the field to translate; None for the first of `FIELDS` that exists.
        source: language of the text.

    Attributes:
        marks_rows: whether a kept row can carry the names of its suspicions.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self._path, self._field, self._source = path, field, source

    def rows(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            DataError: naming file and line, for the first row that cannot be read.
        """
        raise NotImplementedError

    def writer(self, stream: BinaryIO) -> Writer:
        """A writer of the same format into a stream."""
        raise NotImplementedError

    def _choose_field(self, names: list[str]) -> str:
        """The field to translate, out of those the file has.

        Raises:
            DataError: the file does not have it.
        """
        wanted = FIELDS if self._field is None else (self._field,)
        for name in wanted:
            if name in names:
                return name
        raise DataError(
            f"{self._path}: no field {' or '.join(wanted)}; it has {', '.join(names) or 'none'}. "
            "Name the field with --field."
        )

    def _refused(self, line: int, reason: str) -> DataError:
        return DataError.at(self._path, line, reason)


def open_text_file(path: Path, field: str | None, source: str) -> TextFile:
    """The file at `path`, by the format its name tells.

    Args:
        path: `.jsonl`, `.csv`, `.tsv`, `.txt` (each also with `.gz`) or `.parquet`.
        field: which field holds the text; None for the first of `FIELDS` that exists.
        source: language of the text: names the field that keeps it (`sentence2_en`).

    Raises:
        DataError: there is no such file, or not such a field.
        UsageError: no format has that ending.
    """
    kind = format_of(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    kinds = {
        "jsonl": _JsonLinesFile, "csv": _DelimitedFile, "plain": _PlainFile,
        "parquet": _ParquetFile,
    }  # fmt: skip
    return kinds[kind](path, field, source)


def _pair_id(values: dict[str, Any]) -> str | None:
    value = first_value(values, ID_KEYS)
    return value if value is None or type(value) is str else str(value)


class _JsonLinesFile(TextFile):
    """A row's bytes stay as they are, except for the value that is translated."""

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        super().__init__(path, field, source)
        if field is None:
            next(self.rows(), None)  # the first row tells

    def rows(self) -> Iterator[Row]:
        """The rows; blank lines are skipped. A row's record is its line and its values."""
        with reading(self._path) as stream:
            for number, values, line in json_rows(stream):
                if isinstance(values, BadRow):
                    raise self._refused(number, str(values))
                if self._field is None:
                    self._field = self._choose_field(list(values))
                text = values.get(self._field)
                if type(text) is not str:
                    what = f"is {short(text)}" if self._field in values else "is missing"
                    raise self._refused(number, f'"{self._field}" {what}; expected a string.')
                yield Row(number, text, _pair_id(values), (line, values))

    def writer(self, stream: BinaryIO) -> Writer:
        # A file without rows has not told its field, and needs none.
        return _JsonLinesWriter(stream, self._field or "", self._source)


class _JsonLinesWriter(Writer):
    """Writes rows back with the value replaced, and the source and the marks added at the end."""

    def __init__(self, stream: BinaryIO, field: str, source: str) -> None:
        self._stream, self._field, self._key = stream, field, _quote(field)
        self._source_field = f"{field}_{source}"
        self._source_key = b", " + _quote(self._source_field) + b": "

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        line, values = row.record
        quoted = _quote(row.text)
        start = line.find(self._key + b": " + quoted) + len(self._key) + 2
        end = start + len(quoted)
        # Nearly every row is flat and names the field once; such a name is not part of a string,
        # where its quotes would be escaped.
        if start < len(self._key) + 2 or line.count(self._key) > 1 or line.count(b"{") > 1:
            start, end = _search(line, self._field)
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


class _DelimitedFile(TextFile):
    """CSV or TSV, with a header. Cells may hold line breaks; a row's record is its cells."""

    def rows(self) -> Iterator[Row]:
        with reading(self._path) as stream:
            records = DelimitedRows(stream)
            column = records.header.index(self._choose_field(records.header))
            for number, values, cells in records:
                if isinstance(values, BadRow):
                    raise self._refused(number, str(values))
                yield Row(number, cells[column], _pair_id(values), cells)

    def writer(self, stream: BinaryIO) -> Writer:
        with reading(self._path) as lines:
            records = DelimitedRows(lines)
        field = self._choose_field(records.header)
        return _DelimitedWriter(stream, records, field, self._source)


class _DelimitedWriter(Writer):
    """Keeps delimiter, line ends and quoting; source and suspicions are the last columns."""

    def __init__(self, stream: BinaryIO, records: DelimitedRows, field: str, source: str) -> None:
        line, header = records.first_line, records.header
        bom = line.startswith(b"\xef\xbb\xbf")
        cells = line.decode("utf-8-sig", "replace").strip().split(records.delimiter)
        quotes_all = all(cell.startswith('"') and cell.endswith('"') for cell in cells)
        self._text = io.TextIOWrapper(stream, "utf-8-sig" if bom else "utf-8", newline="")
        self._writer = csv.writer(
            self._text,
            delimiter=records.delimiter,
            lineterminator="\r\n" if line.endswith(b"\r\n") else "\n",
            quoting=csv.QUOTE_ALL if quotes_all else csv.QUOTE_MINIMAL,
        )
        self._column = header.index(field)
        source_field = f"{field}_{source}"
        self._keeps_source = source_field not in header
        added = [source_field] if self._keeps_source else []
        self._writer.writerow([*header, *added, SUSPECT_FIELD])

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        cells = list(row.record)
        cells[self._column] = translation
        if self._keeps_source:
            cells.append(row.text)
        self._writer.writerow([*cells, " ".join(suspicions)])

    def close(self) -> None:
        self._text.detach()


class _PlainFile(TextFile):
    """A sentence a line: line 7 of the translation belongs to that of the source."""

    marks_rows = False

    def rows(self) -> Iterator[Row]:
        """The lines, empty ones too; a row's record is its line break."""
        with reading(self._path) as stream:
            for number, data in enumerate(stream, 1):
                try:
                    line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise self._refused(number, "not UTF-8; convert the file.") from None
                text = line.removesuffix("\n").removesuffix("\r")
                yield Row(number, text, None, line[len(text) :])

    def writer(self, stream: BinaryIO) -> Writer:
        return _PlainWriter(stream)


class _PlainWriter(Writer):
    """Writes one line for every line read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        # A line break that an engine made up would shift all lines below.
        line = " ".join(translation.splitlines()) if row.text != translation else translation
        self._stream.write((line + row.record).encode("utf-8", "replace"))

    def leave_out(self, row: Row) -> None:
        self._stream.write(row.record.encode())


class _ParquetFile(TextFile):
    """A row's record is its batch and its place in it."""

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
        with reading_parquet(self._path, self._path) as file:
            for batch in file.iter_batches(PARQUET_BATCH):
                for index, values in enumerate(batch.select(keys).to_pylist()):
                    number += 1
                    text = values[self._column]
                    if text is None:
                        raise self._refused(number, f"{self._column} is null; expected a string.")
                    yield Row(number, text, _pair_id(values), (batch, index))

    def writer(self, stream: BinaryIO) -> Writer:
        return _ParquetWriter(stream, self._schema, self._column, self._source, self._compression)


class _ParquetWriter(Writer):
    """Writes the same schema, and columns for source and suspicions at the end."""

    def __init__(
        self, stream: BinaryIO, schema: Any, field: str, source: str, compression: str
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        self._field, self._source_field = field, f"{field}_{source}"
        self._keeps_source = self._source_field not in schema.names
        if self._keeps_source:
            schema = schema.append(pyarrow.field(self._source_field, pyarrow.string()))
        marks = pyarrow.field(SUSPECT_FIELD, pyarrow.list_(pyarrow.string()))
        self._schema = schema.append(marks)
        self._writer = pyarrow.parquet.ParquetWriter(stream, self._schema, compression=compression)
        self._batch: Any = None
        self._kept: list[tuple[int, str, str, tuple[str, ...]]] = []
        self._tables: list[Any] = []
        self._num_rows = self._num_bytes = 0

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        batch, index = row.record
        if batch is not self._batch:
            self._finish_batch()
            self._batch = batch
        self._kept.append((index, row.text, translation, suspicions))

    def close(self) -> None:
        self._finish_batch()
        self._write_group()
        self._writer.close()

    def _finish_batch(self) -> None:
        if not self._kept:
            return
        indices, texts, translations, suspicions = zip(*self._kept, strict=True)
        array = self._arrow.array
        taken = self._batch.take(array(indices))
        columns = dict(zip(taken.schema.names, taken.columns, strict=True))
        columns[self._field] = array(translations, self._schema.field(self._field).type)
        if self._keeps_source:
            columns[self._source_field] = array(texts, self._arrow.string())
        columns[SUSPECT_FIELD] = array([list(names) for names in suspicions])
        arrays = [columns[name].cast(self._schema.field(name).type) for name in self._schema.names]
        self._tables.append(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._kept = []
        self._num_rows += len(indices)
        self._num_bytes += self._tables[-1].nbytes
        if self._num_rows >= _GROUP_ROWS or self._num_bytes >= _GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        if self._tables:
            self._writer.write_table(self._arrow.concat_tables(self._tables))
        self._tables, self._num_rows, self._num_bytes = [], 0, 0
