"""Files with texts to translate: read row by row, written with everything else as it was."""

from __future__ import annotations

import csv
import io
import itertools
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


#: Writes a row with its text replaced, and its suspicions where the format has a place for them.
Write = Callable[[Row, str, tuple[str, ...]], None]


class TextFile(ABC):
    """A file of one of the formats.

    Args:
        path: the file.
        field: the field to translate; None for the first of `FIELDS` that exists.
        source: language of the text.

    Attributes:
        marks_rows: whether a kept row can carry the names of its suspicions. Where none can, every
            line keeps its place, and one without a translation is to be written empty.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self.path, self._field, self._source = path, field, source

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            DataError: naming file and line, for the first row that cannot be read.
        """

    @abstractmethod
    def writer(self, stream: BinaryIO) -> AbstractContextManager[Write]:
        """What writes rows in the same format into a stream, which stays open after the block."""

    def _choose_field(self, names: list[str]) -> str:
        """The field to translate, out of those the file has.

        Raises:
            DataError: the file does not have it, or is not UTF-8.
        """
        wanted = FIELDS if self._field is None else (self._field,)
        for name in wanted:
            if name in names:
                return name
        if is_garbled(names):
            raise self._refused(1, NOT_UTF8)
        raise DataError(
            f"{self.path}: no field {' or '.join(wanted)}; it has {', '.join(names) or 'none'}. "
            "Name the field with --field."
        )

    def _refused(self, line: int, reason: str) -> DataError:
        return DataError.at(self.path, line, reason)


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
    kinds: dict[str, Callable[[Path, str | None, str], TextFile]] = {
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
        with reading(self.path) as stream:
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

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """The source and the marks are added at the end of a row."""
        field = self._field or ""  # a file without rows has not told it, and needs none
        key, source_field = _quote(field), f"{field}_{self._source}"
        source_key = b", " + _quote(source_field) + b": "

        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            line, values = row.record
            quoted = _quote(row.text)
            start = line.find(key + b": " + quoted) + len(key) + 2
            end = start + len(quoted)
            # Nearly every row is flat and names the field once; such a name is not part of a
            # string, where its quotes would be escaped.
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
        with reading(self.path) as stream:
            records = DelimitedRows(stream)
            column = records.header.index(self._choose_field(records.header))
            for number, values, cells in records:
                if isinstance(values, BadRow):
                    raise self._refused(number, str(values))
                yield Row(number, cells[column], _pair_id(values), cells)

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """Keeps delimiter, line ends and quoting; source and suspicions are the last columns."""
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
    """A sentence a line: line 7 of the translation belongs to that of the source."""

    marks_rows = False

    def rows(self) -> Iterator[Row]:
        """The lines, empty ones too; a row's record is its line break."""
        for number, line in text_lines(self.path):
            text = line.removesuffix("\n").removesuffix("\r")
            yield Row(number, text, None, line[len(text) :])

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            # A line break that an engine made up would shift all lines below.
            line = " ".join(translation.splitlines()) if row.text != translation else translation
            stream.write((line + row.record).encode("utf-8", "replace"))

        yield write


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
        with reading_parquet(self.path, self.path) as file:
            for batch in file.iter_batches(PARQUET_BATCH):
                for index, values in enumerate(batch.select(keys).to_pylist()):
                    number += 1
                    text = values[self._column]
                    if text is None:
                        raise self._refused(number, f"{self._column} is null; expected a string.")
                    yield Row(number, text, _pair_id(values), (batch, index))

    @contextmanager
    def writer(self, stream: BinaryIO) -> Iterator[Write]:
        """The schema gets columns for source and suspicions at its end."""
        import pyarrow
        import pyarrow.parquet

        source_field = f"{self._column}_{self._source}"
        schema = self._schema
        if source_field not in schema.names:
            schema = schema.append(pyarrow.field(source_field, pyarrow.string()))
        schema = schema.append(pyarrow.field(SUSPECT_FIELD, pyarrow.list_(pyarrow.string())))
        kept: list[tuple[Row, str, tuple[str, ...]]] = []
        num_bytes = 0

        def write(row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
            nonlocal num_bytes
            batch, _ = row.record
            if not kept or batch is not kept[-1][0].record[0]:
                num_bytes += batch.nbytes
            kept.append((row, translation, suspicions))
            if len(kept) >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
                write_group()

        def write_group() -> None:
            nonlocal num_bytes
            if not kept:
                return
            rows, translations, suspicions = zip(*kept, strict=True)
            batches = []
            records = (row.record for row in rows)
            for _, group in itertools.groupby(records, key=lambda record: id(record[0])):
                (batch, *_), indices = zip(*group, strict=True)
                batches.append(batch.take(pyarrow.array(indices)))
            table = pyarrow.Table.from_batches(batches)
            columns = dict(zip(table.column_names, table.columns, strict=True))
            columns[self._column] = pyarrow.array(translations, schema.field(self._column).type)
            columns.setdefault(source_field, pyarrow.array([row.text for row in rows]))
            columns[SUSPECT_FIELD] = pyarrow.array([list(names) for names in suspicions])
            arrays = [columns[part.name].cast(part.type) for part in schema]
            out.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            kept.clear()
            num_bytes = 0

        out = pyarrow.parquet.ParquetWriter(stream, schema, compression=self._compression)
        with closing(out):
            yield write
            write_group()
