"""Pairs to judge, read row by row: JSON Lines or CSV, from a file or as they come down a pipe.

A row that cannot be used is handed on as a `DataError` in its place, so that one bad row does not
stop the others.
"""

from __future__ import annotations

import csv
import json
import os
import select
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from clseave_cli.errors import DataError

_COLUMNS = ("image", "hypothesis")
_DELIMITERS = ",;\t"
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 16 << 20


class Pair(NamedTuple):
    """An image, as its row names it, and a sentence about it."""

    image: str
    hypothesis: str


def read_pairs(stream: BinaryIO, name: str, batch_size: int) -> Iterator[list[Pair | DataError]]:
    """The rows of a stream in order, in batches.

    A batch is smaller than `batch_size` only at the end, or where the next row is not there yet: a
    program that writes one row and waits for the answer gets it.

    Args:
        stream: a file or pipe. CSV where the first line names the columns image and hypothesis
            (separated by comma, semicolon or tab), JSON Lines otherwise. Empty lines are skipped.
        name: what messages call it.
        batch_size: most rows in a batch.

    Raises:
        DataError: the stream breaks, or a line is far too long.
    """
    lines = _Lines(stream, name)
    header = lines.peek()
    delimiter = _delimiter(header)
    if delimiter is not None:
        rows = _csv_rows(lines, name, delimiter)
    elif name.endswith((".csv", ".tsv")):
        raise DataError.at(name, 1, "expected a header with the columns image and hypothesis.")
    else:
        rows = _json_rows(lines, name)
    for row in rows:
        batch = [row]
        while len(batch) < batch_size and lines.ready and (more := next(rows, None)) is not None:
            batch.append(more)
        yield batch


class _Lines:
    """The lines of a stream, and whether the next one is there already."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._whole: deque[bytes] = deque()
        self._begun = bytearray()
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._whole:
            if self._ended:
                raise StopIteration
            self._read()
        return self._whole.popleft()

    @property
    def ready(self) -> bool:
        """Whether asking for the next line does not have to wait."""
        while not (self._whole or self._ended):
            if not select.select([self._stream], [], [], 0)[0]:
                return False
            self._read()
        return True

    def peek(self) -> bytes:
        """The next line, left where it is; empty at the end."""
        line = next(self, b"")
        if line:
            self._whole.appendleft(line)
        return line

    def _read(self) -> None:
        try:
            # Past Python's buffer: what lies there would be hidden from `select`.
            chunk = os.read(self._stream.fileno(), _CHUNK_BYTES)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror}).") from None
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            self._begun += part
            self._whole.append(bytes(self._begun) + b"\n")
            self._begun.clear()
        self._begun += rest
        if len(self._begun) > _LONGEST_LINE_BYTES:
            raise DataError(
                f"{self._name}: a line of more than {_LONGEST_LINE_BYTES >> 20} MiB; "
                "expected JSON Lines or CSV."
            )
        if not chunk:
            self._ended = True
            if self._begun:
                self._whole.append(bytes(self._begun))


def _delimiter(header: bytes) -> str | None:
    """What separates the columns of a CSV header that names ours; None for any other line."""
    text = header.decode("utf-8-sig", errors="replace").strip()
    for delimiter in _DELIMITERS:
        if set(_COLUMNS) <= set(_header_names(text, delimiter)):
            return delimiter
    return None


def _header_names(text: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in text.split(delimiter)]


def _csv_rows(lines: _Lines, name: str, delimiter: str) -> Iterator[Pair | DataError]:
    header = next(lines).decode("utf-8-sig", errors="replace").strip()
    names = _header_names(header, delimiter)
    columns = [names.index(column) for column in _COLUMNS]
    # Bytes that are not UTF-8 stay what they are in a file's name, and are refused in a sentence.
    texts = (line.decode("utf-8", errors="surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield DataError.at(name, reader.line_num + 1, f"not valid CSV ({error}).")
            continue
        if len(cells) > max(columns):
            yield Pair(*(cells[column] for column in columns))
        elif cells:
            yield DataError.at(
                name, reader.line_num + 1, f"{len(cells)} cells; the header names {len(names)}."
            )


def _json_rows(lines: _Lines, name: str) -> Iterator[Pair | DataError]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_row(line, name, number)


def _json_row(line: bytes, name: str, number: int) -> Pair | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return DataError.at(name, number, "not valid JSON.")
    image = row.get("image") if isinstance(row, dict) else None
    hypothesis = row.get("hypothesis") if isinstance(row, dict) else None
    if not isinstance(image, str) or not isinstance(hypothesis, str):
        found = f"keys {list(row)!r}" if isinstance(row, dict) else type(row).__name__
        return DataError.at(
            name, number, f"expected an object with texts for image and hypothesis ({found[:200]})."
        )
    return Pair(image, hypothesis)
