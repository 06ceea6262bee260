"""Pairs to judge, read row by row: a file of any format, or JSON Lines or CSV down a pipe.

A row that cannot be used is handed on as a `DataError` in its place, so that one bad row does not
stop the others.
"""

from __future__ import annotations

import gzip
import json
import os
import select
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clseave_cli.core.data.answers import ANSWER_KEYS
from clseave_cli.core.data.rows import (
    HYPOTHESIS_KEYS,
    IMAGE_KEYS,
    BadRow,
    DelimitedRows,
    first_value,
    header_of,
    image_name,
    json_rows,
    parquet_rows,
)
from clseave_cli.errors import DataError

# Where a row has the keys of `predict` beside those of a data set, `predict`'s count.
_IMAGE_KEYS, _HYPOTHESIS_KEYS = IMAGE_KEYS[::-1], HYPOTHESIS_KEYS[::-1]
#: Columns that do not go with the answer: it has them already, or something else of that name.
_TAKEN = {*IMAGE_KEYS, *HYPOTHESIS_KEYS, *ANSWER_KEYS}
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 16 << 20


class Pair(NamedTuple):
    """An image, as its row names it, and a sentence about it; `others` go with the answer."""

    image: str
    hypothesis: str
    others: dict[str, Any]


def read_pairs(stream: BinaryIO, name: str, batch_size: int) -> Iterator[list[Pair | DataError]]:
    """The rows of a stream in order, in batches.

    A batch is smaller than `batch_size` only at the end, or where the next row is not there yet: a
    program that writes one row and waits for the answer gets it.

    Args:
        stream: a file or pipe. Parquet by its name; CSV where the first line names columns for
            image and hypothesis; JSON Lines otherwise. Empty lines are skipped.
        name: what messages call it; packed where it ends in `.gz`.
        batch_size: most rows in a batch.

    Raises:
        DataError: the stream breaks, or a line is far too long.
    """
    lines = _Lines(stream, name)
    if name.endswith(".parquet"):
        lines.ended = True
        rows = parquet_rows(stream, Path(name), None)
    else:
        header = set(map(str.strip, header_of(lines.peek())[1]))
        if header & {*IMAGE_KEYS} and header & {*HYPOTHESIS_KEYS}:
            rows = iter(DelimitedRows(lines, errors="surrogateescape"))
        elif name.removesuffix(".gz").endswith((".csv", ".tsv")):
            raise DataError.at(
                name, 1, "expected a header with the columns image and hypothesis, or SNLI-VE's."
            )
        else:
            rows = json_rows(lines)
    pairs = (_pair(values, name, line) for line, values, _ in rows)
    for pair in pairs:
        batch = [pair]
        while len(batch) < batch_size and lines.ready and (more := next(pairs, None)) is not None:
            batch.append(more)
        yield batch


def _pair(row: Any, name: str, line: int) -> Pair | DataError:
    if isinstance(row, BadRow):
        return DataError.at(name, line, str(row))
    image, hypothesis = image_name(row, _IMAGE_KEYS), first_value(row, _HYPOTHESIS_KEYS)
    if not isinstance(image, str) or not isinstance(hypothesis, str):
        keys = f"keys {list(row)!r}"[:200]
        return DataError.at(
            name, line, f"expected an object with texts for image and hypothesis ({keys})."
        )
    others = {key: value for key, value in row.items() if key not in _TAKEN}
    try:
        json.dumps([value for value in others.values() if type(value) in (dict, list)], default=str)
    except RecursionError:
        return DataError.at(name, line, "JSON nested too deeply.")
    return Pair(image, hypothesis, others)


class _Lines:
    """The lines of a stream, and whether the next one is there already."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._name = name
        self._whole: deque[bytes] = deque()
        self._begun = bytearray()
        self.ended = False
        self._read: Callable[[], bytes]
        if name.endswith(".gz"):
            unpacked = gzip.GzipFile(fileobj=stream)
            self._read = lambda: unpacked.read1(_CHUNK_BYTES)
            self._waits: Callable[[], bool] = lambda: False
        else:
            # Past Python's buffer: what lies there would be hidden from `select`.
            self._read = lambda: os.read(stream.fileno(), _CHUNK_BYTES)
            self._waits = lambda: not select.select([stream], [], [], 0)[0]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._whole:
            if self.ended:
                raise StopIteration
            self._fill()
        return self._whole.popleft()

    @property
    def ready(self) -> bool:
        """Whether asking for the next line does not have to wait."""
        while not (self._whole or self.ended):
            if self._waits():
                return False
            self._fill()
        return True

    def peek(self) -> bytes:
        """The next line, left where it is; empty at the end."""
        line = next(self, b"")
        if line:
            self._whole.appendleft(line)
        return line

    def _fill(self) -> None:
        try:
            chunk = self._read()
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self._name}: cannot be read ({reason}).") from None
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
            self.ended = True
            if self._begun:
                self._whole.append(bytes(self._begun))
