"""Parquet, by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from clseave_cli.core.data.text_files import SUSPECT_FIELD, Row, choose_field
from clseave_cli.errors import DataError

_ROWS_AT_ONCE = 2_000
_ROWS_A_GROUP = 20_000


class ParquetFile:
    """A `.parquet` file.

    Args:
        path: the file.
        field: the column to translate; None for the first known one.
        source: language of the text.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self._path = path
        self._source = source
        try:
            with pq.ParquetFile(path) as file:
                self._schema = file.schema_arrow
                groups = file.metadata.num_row_groups
                self._compression = (
                    file.metadata.row_group(0).column(0).compression if groups else "SNAPPY"
                )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error}).") from None
        self._field = choose_field(path, field, self._schema.names)
        kind = self._schema.field(self._field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {self._field} is {kind}; expected strings.")

    def rows(self) -> Iterator[Row]:
        """The rows; `Row.line` counts them from 1."""
        number = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    texts = batch.column(self._field).to_pylist()
                    names = [None] * len(texts)
                    if "pairID" in self._schema.names:
                        names = batch.column("pairID").to_pylist()
                    for index, (text, name) in enumerate(zip(texts, names, strict=True)):
                        number += 1
                        if text is None:
                            raise DataError.at(
                                self._path, number, f"{self._field} is null; expected a string."
                            )
                        yield Row(number, text, None if name is None else str(name), (batch, index))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: damaged after row {number} ({error}).") from None

    def writer(self, stream: BinaryIO) -> ParquetWriter:
        """Writes such a file, with the same schema and two columns more."""
        return ParquetWriter(stream, self._schema, self._field, self._source, self._compression)


class ParquetWriter:
    """Writes rows with the value replaced, and columns for source and suspicions at the end."""

    def __init__(
        self, stream: BinaryIO, schema: Any, field: str, source: str, compression: str
    ) -> None:
        self._field = field
        self._source_field = f"{field}_{source}"
        self._keeps_source = self._source_field not in schema.names
        self._schema = schema
        if self._keeps_source:
            self._schema = self._schema.append(pa.field(self._source_field, pa.string()))
        self._schema = self._schema.append(pa.field(SUSPECT_FIELD, pa.list_(pa.string())))
        kind = "NONE" if compression == "UNCOMPRESSED" else compression
        self._writer = pq.ParquetWriter(stream, self._schema, compression=kind)
        self._batch: Any = None
        self._kept: list[tuple[int, str, str, tuple[str, ...]]] = []
        self._tables: list[Any] = []
        self._num_rows = 0

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Takes one row; they are written a row group at a time."""
        batch, index = row.record
        if batch is not self._batch:
            self._finish_batch()
            self._batch = batch
        self._kept.append((index, row.text, translation, suspicions))

    def leave_out(self, row: Row) -> None:
        """Rows are joined by their keys: one may be missing."""

    def close(self) -> None:
        """Writes what is held back, and the end of the file."""
        self._finish_batch()
        self._write_group()
        self._writer.close()

    def _finish_batch(self) -> None:
        if not self._kept:
            return
        indices, texts, translations, suspicions = zip(*self._kept, strict=True)
        taken = self._batch.take(pa.array(indices))
        columns = dict(zip(taken.schema.names, taken.columns, strict=True))
        columns[self._field] = pa.array(translations, self._schema.field(self._field).type)
        if self._keeps_source:
            columns[self._source_field] = pa.array(texts, pa.string())
        columns[SUSPECT_FIELD] = pa.array([list(names) for names in suspicions])
        arrays = [columns[name].cast(self._schema.field(name).type) for name in self._schema.names]
        self._tables.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._kept = []
        self._num_rows += len(indices)
        if self._num_rows >= _ROWS_A_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._num_rows = [], 0
