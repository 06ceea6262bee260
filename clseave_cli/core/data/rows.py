"""Rows of data files: JSON Lines, CSV and TSV, Parquet and plain text, packed with gzip or not.

Readers yield `(line, values, record)`: the 1-based line a row starts on (in Parquet, its number),
its values by key, and the row as its format has it. A row that cannot be read is a `BadRow` in
place of its values, so that the caller decides whether to stop, to set it aside or to answer it.
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

# The keys of SNLI-VE, XVNLI, e-SNLI-VE and `predict`, in the order they are looked for.
ID_KEYS = ("pairID", "pair_id")
HYPOTHESIS_KEYS = ("sentence2", "hypothesis")
LABEL_KEYS = ("gold_label", "label")
IMAGE_KEYS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image")
_CAPTION_KEY = "sentence1"

#: Field that lists why a kept translation is suspect.
SUSPECT_FIELD = "translation_suspect"

#: Endings of the files of a split, in the order they are looked for.
EXTENSIONS = (".jsonl", ".csv", ".parquet", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
_FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "plain",
    ".parquet": "parquet",
}  # fmt: skip

NOT_UTF8 = "not UTF-8; convert the file."
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = ",;\t"
# The longest cell; csv's own limit, 128 KiB, is lower than some explanations are long.
_MAX_CELL_CHARACTERS = 16 << 20
#: Parquet rows in memory at once: a small file can hold millions of characters in every row.
PARQUET_BATCH = 64

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 40

#: A row as the readers yield it; the last is a line, a list of cells, or a batch and an index.
Record = tuple[int, Any, Any]


class BadRow(Exception):
    """Why a row cannot be used; `text` is its line where that could not be parsed."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.text = text.rstrip("\r\n")


def first_value(row: dict[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first of the keys that the row has; None where it has none."""
    for key in keys:
        value = row.get(key)
        if value is not None:
            return value
    return None


def require_text(row: dict[str, Any] | BadRow, keys: tuple[str, ...], meaning: str) -> str:
    """The text under the first of the keys that the row has.

    Raises:
        BadRow: it is missing, empty, not text, or not valid Unicode; or the row is a bad one.
    """
    if isinstance(row, BadRow):
        raise row
    value = row.get(keys[0])
    if value is None:
        value = first_value(row, keys)
    if value is None:
        raise BadRow(missing(row, keys, meaning))
    if not isinstance(value, str):
        raise BadRow(f"{keys[0]} is {short(value)}; expected {meaning} as text.")
    if not value or value.isspace():
        raise BadRow(f"{keys[0]} is empty; expected {meaning}.")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{keys[0]} holds half a surrogate pair; expected valid Unicode.") from None
    return value


def missing(row: dict[str, Any], keys: tuple[str, ...], meaning: str) -> str:
    """Says that a row has none of the keys, and which of its keys may be one mistyped."""
    # Never the caption: taken for the hypothesis, it would give the label away.
    others = [key for key in row if key not in keys and key != _CAPTION_KEY]
    near = [match for key in keys for match in difflib.get_close_matches(key, others, 1, 0.8)]
    hint = f" (the row has {short(near[0])})" if near else ""
    return f"no {keys[0]}{hint}; expected {meaning}."


def image_name(row: dict[str, Any], keys: Iterable[str] = IMAGE_KEYS) -> Any:
    """What a row calls its image; a number is a name, too."""
    value = first_value(row, keys)
    return str(value) if type(value) is int else value


def short(value: Any) -> str:
    """A value for a message, however long or deeply nested it is."""
    return "null" if value is None else _REPR.repr(value)


def split_name(path: Path) -> tuple[str, str]:
    """A file's name without and with only its format: (`x.train`, `.jsonl.gz`)."""
    packed = ".gz" if path.suffix == ".gz" else ""
    name = path.name.removesuffix(packed)
    suffix = Path(name).suffix
    return name.removesuffix(suffix), suffix + packed


def format_of(path: Path) -> str:
    """The format that a file's name tells: `jsonl`, `csv`, `plain` or `parquet`.

    Raises:
        UsageError: no format has that ending.
    """
    ending = split_name(path)[1].lower()
    kind = _FORMATS.get(ending.removesuffix(".gz"))
    if kind is None or ending == ".parquet.gz":
        raise UsageError(
            f"{path}: cannot tell the format by the ending; expected .jsonl, .csv, .tsv or .txt "
            "(each also with .gz), or .parquet."
        )
    return kind


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name ends in `.gz`.

    Raises:
        DataError: it cannot be read, or the packing is damaged.
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
    """A stream to write to, packed where `path` ends in `.gz`, always into the same bytes."""
    if path.suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
            yield cast(BinaryIO, packed)
    else:
        yield stream


def read_rows(path: Path, columns: Collection[str]) -> Iterator[Record]:
    """The rows of a JSON Lines, CSV, TSV or Parquet file.

    Args:
        path: the file.
        columns: the keys to read; formats that store whole rows give the others too.

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
    """The lines of a text file with their numbers, line ends included.

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
    """What Python's laxer parser makes of a line that orjson refuses, or what is wrong with it."""
    try:
        return json.loads(line.decode())  # of bytes, it would also take UTF-16
    except UnicodeDecodeError:
        reason = NOT_UTF8
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno})."
    except RecursionError:
        reason = "not valid JSON (nested too deeply)."
    except ValueError as error:  # such as a number of thousands of digits
        reason = f"not valid JSON ({error})."
    return BadRow(reason, line.decode(errors="replace"))


class DelimitedRows:
    """The rows of CSV or TSV, read strictly: every line of the file belongs to exactly one row.

    A quote that is opened and not closed makes one row of many lines. Then its first line alone is
    bad; the others are read again. Empty cells have no value.

    Args:
        lines: the lines, the header first.
        errors: what happens to bytes that are not UTF-8, as for `bytes.decode`.

    Attributes:
        header: the cells of the first row, as they stand there.
        delimiter: whatever of comma, semicolon and tab makes most cells of the first line.
        first_line: the first line itself.
    """

    def __init__(self, lines: Iterable[bytes], errors: str = "strict") -> None:
        csv.field_size_limit(_MAX_CELL_CHARACTERS)
        source = iter(lines)
        self.first_line = next(source, b"")
        self.delimiter, self.header = header_of(self.first_line)
        self._source, self._errors = source, errors
        self._again: list[str] = []
        self._taken: list[str] = []

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
                reason = "" if not cells or len(cells) == len(names) else self._miscounted(cells)
                if len(self._taken) > 1 and not reason and self._swallows_rows():
                    reason = "not valid CSV (the lines of several rows in one cell)."
            if reason:
                first, *others = self._taken
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
            line += len(self._taken)
            self._taken.clear()

    def _reader(self) -> Iterator[list[str]]:
        self._taken.clear()
        return csv.reader(self._lines(), delimiter=self.delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        """The lines to come as text, noted in `_taken`; first those to read again."""
        while self._again:
            self._taken.append(self._again.pop())
            yield self._taken[-1]
        for content in self._source:
            try:
                line = content.decode("utf-8", self._errors)
            except UnicodeDecodeError:
                self._taken.append(content.decode("utf-8", "replace"))
                raise
            self._taken.append(line)
            yield line

    def _miscounted(self, cells: list[str]) -> str:
        return f"{len(cells)} cells; expected {len(self.header)}, as in the header."

    def _swallows_rows(self) -> bool:
        """Whether all lines taken after the first look like rows: two stray quotes do that."""
        # Not prose with as many commas: there are spaces after them, or quotes that are doubled.
        width = len(self.header)
        return width > 1 and all(
            len(cells := line.split(self.delimiter)) == width
            and not any(cell.startswith(" ") for cell in cells[1:])
            and '""' not in line
            for line in self._taken[1:]
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
    """Whether names of columns were decoded from something else than UTF-8, such as UTF-16."""
    return not {"\0", "\ufffd"}.isdisjoint("".join(names))


@contextmanager
def reading_parquet(source: Path | BinaryIO, name: str | Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; `name` is what messages call it.

    Raises:
        DataError: it is damaged, or holds what Python has no value for.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            yield file
    # A damaged file shows as any of these, depending on where the damage is.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name}: not a readable Parquet file ({reason}).") from None


def parquet_rows(
    source: Path | BinaryIO, name: str | Path, columns: Collection[str] | None = None
) -> Iterator[Record]:
    """The rows of a Parquet file; only the given columns are read (None: all of them)."""
    line = 0
    with reading_parquet(source, name) as file:
        names = [n for n in file.schema_arrow.names if columns is None or n in columns]
        for batch in file.iter_batches(PARQUET_BATCH, columns=names):
            for values in batch.to_pylist():
                line += 1
                yield line, values, None


def json_line(value: dict[str, Any]) -> bytes:
    """A row as a line of JSON; half a surrogate pair stays written as an escape."""
    line = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    return line.encode(errors="backslashreplace")
