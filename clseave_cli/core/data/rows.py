"""Rows of data files: JSON Lines, CSV, TSV, Parquet and plain text, also compressed with gzip.

Readers yield `(line, values, record)`: the 1-based line a row starts on (in Parquet, its number),
its values by key, and the row in its format. If a row cannot be read, a `BadRow` replaces its
values, and the caller decides what to do with it.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import reprlib
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from clseave_cli.errors import DataError, UsageError

# The keys of SNLI-VE, XVNLI, e-SNLI-VE and `predict`; the first one present is used.
ID_KEYS = ("pairID", "pair_id")
HYPOTHESIS_KEYS = ("sentence2", "hypothesis")
LABEL_KEYS = ("gold_label", "label")
IMAGE_KEYS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image")
_CAPTION_KEY = "sentence1"

#: Field with the reasons why a translation is suspect.
SUSPECT_FIELD = "translation_suspect"

#: Extensions of a split's files; the first one that exists is used.
EXTENSIONS = (".jsonl", ".csv", ".parquet", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
_FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "plain",
    ".parquet": "parquet",
}  # fmt: skip

NOT_UTF8 = "not UTF-8; convert the file."
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = ",;\t"
# Some explanations exceed csv's default, 128 KiB.
_MAX_CELL_CHARACTERS = 16 << 20
#: Parquet rows in memory at once: even in a small file, rows can have millions of characters.
PARQUET_BATCH = 64

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 40

#: What the readers yield; the last item is a line of JSON, a list of cells, or None.
Record = tuple[int, Any, Any]


class BadRow(Exception):
    """Why a row cannot be used; `text` is its line, if it could not be parsed."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.text = text.rstrip("\r\n")


def first_value(row: dict[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first key that the row has; None: it has none of them."""
    for key in keys:
        value = row.get(key)
        if value is not None:
            return value
    return None


def require_text(row: dict[str, Any] | BadRow, keys: tuple[str, ...], meaning: str) -> str:
    """The text of the first key that the row has.

    Raises:
        BadRow: `row`; or the text is missing, empty, not a string, or not valid Unicode.
    """
    if isinstance(row, BadRow):
        raise row
    value = row.get(keys[0])  # the usual case, fast
    if value is None and (value := first_value(row, keys)) is None:
        raise BadRow(missing(row, keys, meaning))
    if not isinstance(value, str):
        raise BadRow(f"{keys[0]} is {short(value)}; expected {meaning} as text.")
    if not value or value.isspace():
        raise BadRow(f"{keys[0]} is empty; expected {meaning}.")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{keys[0]} has half a surrogate pair; expected valid Unicode.") from None
    return value


def missing(row: dict[str, Any], keys: tuple[str, ...], meaning: str) -> str:
    """A message for a row with none of the keys; suggests one that may be mistyped."""
    # Never suggests the caption: as the hypothesis, it would give the label away.
    others = [key for key in row if key not in keys and key != _CAPTION_KEY]
    near = [match for key in keys for match in difflib.get_close_matches(key, others, 1, 0.8)]
    hint = f" (the row has {short(near[0])})" if near else ""
    return f"no {keys[0]}{hint}; expected {meaning}."


def image_name(row: dict[str, Any], keys: Iterable[str] = IMAGE_KEYS) -> Any:
    """The name of a row's image, which may be a number."""
    value = first_value(row, keys)
    return str(value) if type(value) is int else value


def short(value: Any) -> str:
    """A value for a message, however long or deeply nested."""
    return "null" if value is None else _REPR.repr(value)


def split_name(path: Path) -> tuple[str, str]:
    """Splits a file's name before the extension: (`x.train`, `.jsonl.gz`)."""
    packed = ".gz" if path.suffix == ".gz" else ""
    name = Path(path.name.removesuffix(packed))
    return name.stem, name.suffix + packed


def format_of(path: Path) -> str:
    """The format of a file, from its name: `jsonl`, `csv`, `plain` or `parquet`.

    Raises:
        UsageError: no format has this extension.
    """
    extension = split_name(path)[1].lower()
    kind = _FORMATS.get(extension.removesuffix(".gz"))
    if kind is None or extension == ".parquet.gz":
        raise UsageError(
            f"{path}: unknown format; expected a name ending in .jsonl, .csv, .tsv or .txt (each "
            "also with .gz), or .parquet."
        )
    return kind


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends in `.gz`.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw, "rb") as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); fetch it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


@contextmanager
def packing(path: Path, stream: BinaryIO) -> Iterator[BinaryIO]:
    """A stream that compresses, reproducibly, if `path` ends in `.gz`."""
    if path.suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
            yield cast(BinaryIO, packed)
    else:
        yield stream


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[Record]:
    """The rows of a JSON Lines, CSV, TSV or Parquet file.

    Of Parquet, only the given columns are read (None: all).

    Raises:
        DataError: the file cannot be read.
    """
    kind = format_of(path)
    if kind == "parquet":
        yield from parquet_rows(path, path, columns)
    else:
        with reading(path) as stream:
            yield from DelimitedRows(stream) if kind == "csv" else json_rows(stream)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, line ends included.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    with reading(path) as stream:
        for number, data in enumerate(stream, 1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError.at(path, number, NOT_UTF8) from None
            yield number, line


def json_rows(lines: Iterable[bytes]) -> Iterator[Record]:
    """The rows of JSON Lines; blank lines are skipped."""
    for number, line in enumerate(lines, 1):
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            values = _patient_json(line)
        if type(values) is not dict and not isinstance(values, BadRow):
            reason = f"expected a JSON object, found {type(values).__name__}."
            values = BadRow(reason, line.decode(errors="replace"))
        yield number, values, line


def _patient_json(line: bytes) -> Any:
    """A line that orjson refuses, by Python's more tolerant parser, or what is wrong with it."""
    try:
        return json.loads(line.decode())  # given bytes, it would accept UTF-16, too
    except UnicodeDecodeError:
        reason = NOT_UTF8
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno})."
    except RecursionError:
        reason = "not valid JSON (nested too deeply)."
    except ValueError as error:  # such as a number with thousands of digits
        reason = f"not valid JSON ({error})."
    return BadRow(reason, line.decode(errors="replace"))


class DelimitedRows:
    """The rows of CSV or TSV, read strictly: every line of the file belongs to exactly one row.

    An unclosed quote would join many lines to one row. Then only the first line is bad, and the
    others are read again. Empty cells have no value.

    Args:
        lines: the lines, beginning with the header.
        errors: how to treat bytes that are not UTF-8, as in `bytes.decode`.

    Attributes:
        header: the cells of the first line.
        delimiter: comma, semicolon or tab, whichever is most frequent in the first line.
        first_line: the bytes of the first line.
    """

    def __init__(self, lines: Iterable[bytes], errors: str = "strict") -> None:
        csv.field_size_limit(_MAX_CELL_CHARACTERS)
        self._source, self._errors = iter(lines), errors
        self.first_line = next(self._source, b"")
        self.delimiter, self.header = header_of(self.first_line)
        self._again: list[str] = []  # lines to read again, the next one last
        self._row_lines: list[str] = []  # lines of the current row

    def __iter__(self) -> Iterator[Record]:
        names = [name.strip() for name in self.header]
        try:
            self.first_line.decode("utf-8", self._errors)
        except UnicodeDecodeError:
            yield 1, BadRow(NOT_UTF8, repr(self.first_line)), None
        reader = self._reader()
        line = 2
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                reason = NOT_UTF8
            except csv.Error as error:
                reason = f"not valid CSV ({error})."
            else:
                reason = ""
                if cells and len(cells) != len(names):
                    reason = f"{len(cells)} cells; expected {len(names)}, as in the header."
                elif len(self._row_lines) > 1 and self._swallows_rows():
                    reason = "not valid CSV (the lines of several rows in one cell)."
            if reason:
                first, *others = self._row_lines
                if others:
                    reason += " Is a quote opened here and not closed?"
                yield line, BadRow(reason, first), None
                self._again += reversed(others)
                reader = self._reader()
                line += 1
                continue
            if cells:
                values = dict(zip(names, cells, strict=True))
                if "" in cells:
                    values = {name: cell for name, cell in values.items() if cell}
                yield line, values, cells
            line += len(self._row_lines)
            self._row_lines.clear()

    def _reader(self) -> Iterator[list[str]]:
        self._row_lines.clear()
        return csv.reader(self._lines(), delimiter=self.delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        while self._again:
            self._row_lines.append(self._again.pop())
            yield self._row_lines[-1]
        for content in self._source:
            try:
                line = content.decode("utf-8", self._errors)
            except UnicodeDecodeError:
                self._row_lines.append(content.decode("utf-8", "replace"))
                raise
            self._row_lines.append(line)
            yield line

    def _swallows_rows(self) -> bool:
        """Whether all lines of a row but the first look like rows, after two stray quotes."""
        # Prose with as many commas has spaces after them, or doubled quotes.
        width = len(self.header)
        return width > 1 and all(
            len(cells := line.split(self.delimiter)) == width
            and not any(cell.startswith(" ") for cell in cells[1:])
            and '""' not in line
            for line in self._row_lines[1:]
        )


def header_of(line: bytes) -> tuple[str, list[str]]:
    """The delimiter of a CSV header, and its cells."""
    text = line.decode("utf-8-sig", "replace").strip("\r\n")
    delimiter = max(_DELIMITERS, key=text.count)
    try:
        return delimiter, next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error:
        return delimiter, [text]


def is_garbled(names: Iterable[str]) -> bool:
    """Whether column names were decoded from an encoding other than UTF-8, such as UTF-16."""
    return not {"\0", "\ufffd"}.isdisjoint("".join(names))


@contextmanager
def reading_parquet(source: Path | BinaryIO, name: str | Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; `name` is for messages.

    Raises:
        DataError: it is damaged, or contains values that Python cannot represent.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            yield file
    # Depending on the place, damage causes any of these.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name}: not a readable Parquet file ({reason}).") from None


def parquet_rows(
    source: Path | BinaryIO, name: str | Path, columns: Collection[str] | None = None
) -> Iterator[Record]:
    """The rows of a Parquet file; reads only the given columns (None: all)."""
    with reading_parquet(source, name) as file:
        names = [n for n in file.schema_arrow.names if columns is None or n in columns]
        batches = file.iter_batches(PARQUET_BATCH, columns=names)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((line, values, None) for line, values in enumerate(rows, 1))


def json_line(value: dict[str, Any]) -> bytes:
    """A row as a line of JSON; half a surrogate pair is escaped."""
    line = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    return line.encode(errors="backslashreplace")
