"""Files with texts to translate: read row by row, written with everything else as it was."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from clseave_cli.errors import DataError, UsageError

#: Fields that hold the text in the data sets known, where the user names none.
FIELDS = ("sentence2", "hypothesis", "text")

#: Field in which a kept translation's suspicions are listed.
SUSPECT_FIELD = "translation_suspect"

_FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "plain",
    ".parquet": "parquet",
}  # fmt: skip


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


class Writer(Protocol):
    """Writes the rows of one translated file."""

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes a row with its text replaced."""

    def leave_out(self, row: Row) -> None:
        """A row there is no translation for; an empty line where lines must keep their places."""

    def close(self) -> None:
        """Writes what is still held back."""


class TextFile(Protocol):
    """A file of one of the formats."""

    #: Whether a kept row can carry the names of its suspicions.
    marks_rows: bool

    def rows(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            DataError: naming file and line, for the first row that cannot be read.
        """

    def writer(self, stream: BinaryIO) -> Writer:
        """A writer of the same format into a stream."""


def split_name(path: Path) -> tuple[str, str]:
    """A file's name without and with only its format: (`x.train`, `.jsonl.gz`)."""
    packed = ".gz" if path.suffix == ".gz" else ""
    name = path.name.removesuffix(packed)
    suffix = Path(name).suffix
    return name.removesuffix(suffix), suffix + packed


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
    ending = split_name(path)[1]
    kind = _FORMATS.get(ending.removesuffix(".gz").lower())
    if kind is None or ending == ".parquet.gz":
        raise UsageError(
            f"{path}: cannot tell the format by the ending; expected .jsonl, .csv, .tsv or .txt "
            "(each also with .gz), or .parquet."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if kind == "jsonl":
        from clseave_cli.core.data.jsonl import JsonLinesFile

        return JsonLinesFile(path, field, source)
    if kind == "csv":
        from clseave_cli.core.data.delimited import DelimitedFile

        return DelimitedFile(path, field, source)
    if kind == "plain":
        from clseave_cli.core.data.plain import PlainFile

        return PlainFile(path)
    from clseave_cli.core.data.parquet import ParquetFile

    return ParquetFile(path, field, source)


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


def choose_field(path: Path, field: str | None, names: list[str]) -> str:
    """The field to translate, out of those the file has.

    Raises:
        DataError: the file does not have it.
    """
    wanted = (field,) if field is not None else FIELDS
    for name in wanted:
        if name in names:
            return name
    has = ", ".join(names) or "none"
    raise DataError(
        f"{path}: no field {' or '.join(wanted)}; it has {has}. Name the field with --field."
    )
