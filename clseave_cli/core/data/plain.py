"""Plain text, a sentence a line: line 7 of the translation belongs to line 7 of the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from clseave_cli.core.data.text_files import Row, reading
from clseave_cli.errors import DataError


class PlainFile:
    """A `.txt` file, packed or not.

    Args:
        path: the file.
    """

    marks_rows = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self) -> Iterator[Row]:
        """The lines; empty ones too."""
        with reading(self._path) as stream:
            for number, data in enumerate(stream, 1):
                try:
                    line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise DataError.at(self._path, number, "not UTF-8; convert the file.") from None
                text = line.removesuffix("\n").removesuffix("\r")
                yield Row(number, text, None, line[len(text) :])

    def writer(self, stream: BinaryIO) -> PlainWriter:
        """Writes such a file."""
        return PlainWriter(stream)


class PlainWriter:
    """Writes one line for every line read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Writes one line; a line break an engine made up becomes a space."""
        line = " ".join(translation.splitlines()) if row.text != translation else translation
        self._stream.write((line + row.record).encode("utf-8", "replace"))

    def leave_out(self, row: Row) -> None:
        """Keeps the place with an empty line."""
        self._stream.write(row.record.encode())

    def close(self) -> None:
        """Every line is written already."""
