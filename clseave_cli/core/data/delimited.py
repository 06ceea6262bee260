"""CSV and TSV, with a header line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clseave_cli.core.data.text_files import SUSPECT_FIELD, Row, choose_field, reading
from clseave_cli.errors import DataError

# The longest cell; csv's own limit, 128 KiB, is lower than some explanations are long.
_MAX_CELL_CHARACTERS = 16 << 20


class _Dialect(NamedTuple):
    bom: bool
    delimiter: str
    line_end: str
    quotes_all: bool


class DelimitedFile:
    """A `.csv` or `.tsv` file, packed or not. Cells may hold line breaks.

    Args:
        path: the file.
        field: the column to translate; None for the first known one.
        source: language of the text.
    """

    marks_rows = True

    def __init__(self, path: Path, field: str | None, source: str) -> None:
        self._path = path
        self._field = field
        self._source = source

    def rows(self) -> Iterator[Row]:
        """The rows below the header."""
        csv.field_size_limit(_MAX_CELL_CHARACTERS)
        dialect = self._dialect()
        with reading(self._path) as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
            reader = csv.reader(text, delimiter=dialect.delimiter, strict=True)
            line = 1
            try:
                header = next(reader, [])
                column = header.index(choose_field(self._path, self._field, header))
                pair_id = header.index("pairID") if "pairID" in header else None
                line = reader.line_num + 1
                for cells in reader:
                    if cells and len(cells) != len(header):
                        raise DataError.at(
                            self._path, line,
                            f"{len(cells)} cells; expected {len(header)}, as in the header.",
                        )  # fmt: skip
                    if cells:
                        name = cells[pair_id] if pair_id is not None else None
                        yield Row(line, cells[column], name, cells)
                    line = reader.line_num + 1
            except csv.Error as error:
                raise DataError.at(self._path, line, f"not valid CSV ({error}).") from None
            except UnicodeDecodeError:
                raise DataError.at(
                    self._path, line, "not UTF-8 here or soon after; convert the file."
                ) from None
            finally:
                text.detach()

    def writer(self, stream: BinaryIO) -> DelimitedWriter:
        """Writes such a file: same delimiter, line ends and kind of quoting."""
        dialect = self._dialect()
        with reading(self._path) as source:
            text = io.TextIOWrapper(source, "utf-8-sig", newline="")
            header = next(csv.reader(text, delimiter=dialect.delimiter), [])
            text.detach()
        field = choose_field(self._path, self._field, header)
        return DelimitedWriter(stream, dialect, header, field, self._source)

    def _dialect(self) -> _Dialect:
        with reading(self._path) as stream:
            head = stream.readline()
        delimiter = "\t" if ".tsv" in self._path.suffixes[-2:] else ","
        bom = head.startswith(b"\xef\xbb\xbf")
        line_end = "\r\n" if head.endswith(b"\r\n") else "\n"
        cells = head.decode("utf-8", "replace").removeprefix("\ufeff").strip().split(delimiter)
        quotes_all = all(cell.startswith('"') and cell.endswith('"') for cell in cells)
        return _Dialect(bom, delimiter, line_end, quotes_all)


class DelimitedWriter:
    """Writes rows with the cell replaced, and columns for source and suspicions at the end."""

    def __init__(
        self, stream: BinaryIO, dialect: _Dialect, header: list[str], field: str, source: str
    ) -> None:
        encoding = "utf-8-sig" if dialect.bom else "utf-8"
        self._text = io.TextIOWrapper(stream, encoding, newline="")
        self._writer = csv.writer(
            self._text,
            delimiter=dialect.delimiter,
            lineterminator=dialect.line_end,
            quoting=csv.QUOTE_ALL if dialect.quotes_all else csv.QUOTE_MINIMAL,
        )
        self._column = header.index(field)
        self._keeps_source = f"{field}_{source}" not in header
        added = [f"{field}_{source}"] if self._keeps_source else []
        self._writer.writerow([*header, *added, SUSPECT_FIELD])

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes one row."""
        cells = list(row.record)
        cells[self._column] = translation
        if self._keeps_source:
            cells.append(row.text)
        self._writer.writerow([*cells, " ".join(suspicions)])

    def leave_out(self, row: Row) -> None:
        """Rows are joined by their keys: one may be missing."""

    def close(self) -> None:
        """Hands over what is still held back, and leaves the stream open."""
        self._text.detach()
