"""Input and output of `predict`: pairs, row by row, and their answers in the same order.

Pairs come from a file of any format, or through a pipe as JSON Lines or CSV. A bad row becomes a
`DataError` in its place, so that it does not stop the others. Unfinished answers are JSON Lines, so
that an interrupted run can resume after the last complete line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import select
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from clseave_cli.core.data.rows import (
    HYPOTHESIS_KEYS,
    ID_KEYS,
    IMAGE_KEYS,
    NOT_UTF8,
    BadRow,
    DelimitedRows,
    first_value,
    header_of,
    image_name,
    is_garbled,
    json_rows,
    parquet_rows,
    read_rows,
    reading_parquet,
    require_text,
)
from clseave_cli.core.files import atomic_file, fsync_folder, locked_target, sweep, writing
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS

#: Keys of an answer, besides image and hypothesis.
ANSWER_KEYS = ("lang", "label", "probabilities", "model", "truncated", "warning", "error")
#: The same as columns of a table.
ANSWER_COLUMNS = ("lang", "label", *LABELS, "model", "truncated", "warning", "error")
# If a row also has the keys of a data set, those of `predict` come first.
_IMAGE_KEYS, _HYPOTHESIS_KEYS = IMAGE_KEYS[::-1], HYPOTHESIS_KEYS[::-1]
_ENDINGS = {"csv": (".csv", ".tsv"), "parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
_PARQUET_ROWS = 1024
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 16 << 20


class Pair(NamedTuple):
    """An image, as its row names it, a sentence about it, and other values for the answer."""

    image: str
    hypothesis: str
    others: dict[str, Any]


class Pairs:
    """The rows of a stream in order, in batches.

    A batch has fewer rows than `size` at the end, or if the next row has not arrived yet: a program
    that writes one row and waits for the answer gets it.

    Args:
        stream: a file or pipe: Parquet, according to its name; CSV, if the first line names columns
            for image and hypothesis; otherwise JSON Lines. Empty lines are skipped.
        name: the path, for messages; `.gz` means compressed.
        size: maximum number of rows in a batch.
        columns: names of the image and hypothesis columns; None: the first usual one.

    Attributes:
        whole: whether `others` of a pair include image and hypothesis, for an output table; None:
            only if the stream is CSV.
    """

    def __init__(self, stream: BinaryIO, name: str, size: int, *columns: str | None) -> None:
        self.name = name
        self.whole: bool | None = None
        self._stream, self._size = stream, size
        self._lines = _Lines(stream, name)
        image, text = columns or (None, None)
        self._image_keys = (image,) if image else _IMAGE_KEYS
        self._text_keys = (text,) if text else _HYPOTHESIS_KEYS

    @cached_property
    def header(self) -> tuple[str, list[str]]:
        """The delimiter and the cells of the first line; waits for it."""
        delimiter, names = header_of(self._lines.peek())
        return delimiter, [name.strip() for name in names]

    @cached_property
    def format(self) -> str:
        """`parquet`, `csv` or `jsonl`; may wait for the first line.

        Raises:
            DataError: a CSV file has no columns for image and hypothesis.
        """
        if self.name.endswith(".parquet"):
            return "parquet"
        names = self.header[1]
        if not (set(names).isdisjoint(self._image_keys) or set(names).isdisjoint(self._text_keys)):
            return "csv"
        if self.name.removesuffix(".gz").endswith((".csv", ".tsv")):
            expected = (
                f"columns {', '.join(names)[:200]}; expected image and hypothesis, or SNLI-VE's. "
                "Choose others with --image-column and --text-column."
            )
            raise DataError.at(self.name, 1, NOT_UTF8 if is_garbled(names) else expected)
        return "jsonl"

    def __iter__(self) -> Iterator[list[Pair | DataError]]:
        if self.format == "parquet":
            self._lines.ended = True
            rows = parquet_rows(self._stream, self.name)
        elif self.format == "csv":
            rows = iter(DelimitedRows(self._lines, errors="surrogateescape"))
        else:
            rows = json_rows(self._lines)
        if self.whole is None:
            self.whole = self.format == "csv"
        lines = self._lines
        pairs = (self._pair(values, line) for line, values, _ in rows)
        for pair in pairs:
            batch = [pair]
            while len(batch) < self._size and lines.ready and (more := next(pairs, None)):
                batch.append(more)
            yield batch

    def named_by(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """The image and the hypothesis of a row."""
        return image_name(row, self._image_keys), first_value(row, self._text_keys)

    def _pair(self, row: Any, line: int) -> Pair | DataError:
        if isinstance(row, BadRow):
            return DataError.at(self.name, line, str(row))
        image, hypothesis = self.named_by(row)
        if not isinstance(image, str) or not isinstance(hypothesis, str):
            keys = f"keys {list(row)!r}"[:200]
            return DataError.at(
                self.name, line, f"expected an object with texts for image and hypothesis ({keys})."
            )
        dropped = {*ANSWER_KEYS, *ANSWER_COLUMNS}
        if not self.whole:
            dropped |= {*IMAGE_KEYS, *HYPOTHESIS_KEYS, *self._image_keys, *self._text_keys}
        others = {key: value for key, value in row.items() if key not in dropped}
        if _holds_gold_labels(row.keys()):
            others["gold_label"] = row["label"]
        nested = [value for value in others.values() if type(value) in (dict, list)]
        try:
            json.dumps(nested, default=str)
        except RecursionError:
            return DataError.at(self.name, line, "JSON nested too deeply.")
        return Pair(image, hypothesis, others)


@dataclass(frozen=True)
class AnswerTable:
    """Answers as a table: the columns of the input, then `ANSWER_COLUMNS`."""

    columns: list[str] = field(default_factory=list)  # of CSV
    delimiter: str = ","  # of CSV
    source: Path | None = None  # the input, if it is Parquet

    @classmethod
    def of(cls, pairs: Pairs, target: Path | None) -> AnswerTable | None:
        """A table of the format in the target's name, or else of the input; None: JSON Lines.

        Raises:
            UsageError: the target (None: a stream) and the input are different kinds of tables.
        """
        ending = target.suffix.lower() if target is not None else ""
        if ending == ".gz":
            raise UsageError(f"{target}: answers are not compressed; leave .gz out of the name.")
        kind = next((kind for kind, endings in _ENDINGS.items() if ending in endings), pairs.format)
        if kind == "jsonl" or (kind == "parquet" and target is None):
            return None
        if kind != pairs.format:
            raise UsageError(
                f"{target}: {pairs.name} is not a table of this kind; name the answers .jsonl."
            )
        if kind == "parquet":
            return cls(source=Path(pairs.name))
        delimiter, names = pairs.header
        delimiter = {".csv": ",", ".tsv": "\t"}.get(ending, delimiter)
        columns = [name for name in names if name not in ANSWER_COLUMNS]
        columns += ["gold_label"] if _holds_gold_labels(names) else []
        return cls([*columns, *ANSWER_COLUMNS], delimiter)

    def encode(self, answers: Iterable[dict[str, Any]], with_header: bool = False) -> bytes:
        """Answers as lines of CSV."""
        text = io.StringIO()
        writer = csv.writer(text, delimiter=self.delimiter, lineterminator="\n")
        if with_header:
            writer.writerow(self.columns)
        for answer in answers:
            cells = (answer.get(name) for name in self.columns)
            writer.writerow(["true" if cell is True else cell for cell in cells])
        return text.getvalue().encode(errors="surrogateescape")

    def write(self, answers: Iterator[dict[str, Any]], stream: BinaryIO) -> None:
        """Writes the whole table."""
        source = self.source
        if source is None:
            stream.write(self.encode((), with_header=True))
            stream.writelines(self.encode([answer]) for answer in answers)
            return
        import pyarrow
        import pyarrow.parquet

        kinds = {"truncated": pyarrow.bool_(), **dict.fromkeys(LABELS, pyarrow.float64())}
        fields = [pyarrow.field(n, kinds.get(n, pyarrow.string())) for n in ANSWER_COLUMNS]
        with reading_parquet(source, source) as file:
            fields_by_name = {field.name: field for field in file.schema_arrow}
        kept = [field for name, field in fields_by_name.items() if name not in ANSWER_COLUMNS]
        if _holds_gold_labels(fields_by_name):
            fields.insert(0, fields_by_name["label"].with_name("gold_label"))
        schema = pyarrow.schema([*kept, *fields])

        def batches() -> Iterator[Any]:
            # A generator, or `reading_parquet` would blame the input for a full disk.
            with reading_parquet(source, source) as file:
                yield from file.iter_batches(_PARQUET_ROWS, columns=[f.name for f in kept])

        with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
            for batch in batches():
                rows = list(islice(answers, batch.num_rows))
                added = pyarrow.Table.from_pylist(rows, pyarrow.schema(fields))
                columns = [*batch.columns, *added.columns]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    def header(self, path: Path) -> list[str]:
        """The column names of such a table."""
        if self.source is not None:
            with reading_parquet(path, path) as file:
                return list(file.schema_arrow.names)
        with path.open("rb") as stream:
            return header_of(stream.readline())[1]


def _holds_gold_labels(names: Iterable[str]) -> bool:
    """Whether `label` is a column of the data, not one of earlier answers."""
    return "label" in names and {"gold_label", "probabilities", *LABELS}.isdisjoint(names)


def read_probabilities(path: Path, pair_ids: Sequence[str]) -> npt.NDArray[np.float32]:
    """(N, 3) probabilities of N rows from a file of answers, in the order of `labels.LABELS`.

    The file is the output of `predict`, or has rows with `pairID` and a column for each label, or
    `probabilities`, by label or as a list. Rows of other ids are skipped.

    Raises:
        DataError: an answer is damaged, or rows have none.
    """
    row_of_id = {pair_id: row for row, pair_id in enumerate(pair_ids)}
    table = np.full((len(pair_ids), len(LABELS)), np.nan, dtype=np.float32)
    for line, answer, _ in read_rows(path, (*ID_KEYS, "probabilities", "error", *LABELS)):
        try:
            if answer.get("error"):
                continue
            values = answer.get("probabilities") or answer
            if isinstance(values, dict):
                values = [float(values[label]) for label in LABELS]
            row = row_of_id.get(require_text(answer, ID_KEYS, "the row's unique id"))
            if len(values) != len(LABELS) or not abs(sum(values) - 1) < 1e-3 or min(values) < 0:
                raise ValueError
        except (BadRow, AttributeError, KeyError, TypeError, ValueError):
            raise DataError.at(
                path, line, "expected pairID and the probabilities of three labels, which add up "
                "to 1, as `clseave predict --output` writes them.",
            ) from None  # fmt: skip
        if row is not None:
            table[row] = values
    missing = np.flatnonzero(np.isnan(table[:, 0]))
    if len(missing):
        raise DataError(
            f"{path}: no probabilities for {len(missing)} of {len(pair_ids)} training rows, such "
            f"as pairID {pair_ids[missing[0]]!r}; run `clseave predict` on the training file."
        )
    return table


class _Lines:
    """The lines of a stream; `ready` tells whether the next one has arrived."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._name = name
        self._complete: deque[bytes] = deque()
        self._incomplete = bytearray()
        self.ended = False
        self._read: Callable[[], bytes]
        if name.endswith(".gz"):
            unpacked = gzip.GzipFile(fileobj=stream)
            self._read = lambda: unpacked.read1(_CHUNK_BYTES)
            self._must_wait: Callable[[], bool] = lambda: False
        else:
            # Bypasses Python's buffer, which `select` does not see.
            self._read = lambda: os.read(stream.fileno(), _CHUNK_BYTES)
            self._must_wait = lambda: not select.select([stream], [], [], 0)[0]

    def __iter__(self) -> Iterator[bytes]:
        while self.peek():
            yield self._complete.popleft()

    def peek(self) -> bytes:
        """The next line, without consuming it; empty at the end."""
        while not (self._complete or self.ended):
            self._fill()
        return self._complete[0] if self._complete else b""

    @property
    def ready(self) -> bool:
        """Whether the next line, or the end, can be read without waiting."""
        while not (self._complete or self.ended or self._must_wait()):
            self._fill()
        return bool(self._complete or self.ended)

    def _fill(self) -> None:
        try:
            chunk = self._read()
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self._name}: cannot be read ({reason}).") from None
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._complete.append(bytes(self._incomplete + end) + b"\n")
            self._incomplete.clear()
        self._incomplete += rest
        if len(self._incomplete) > _LONGEST_LINE_BYTES:
            raise DataError(
                f"{self._name}: a line of more than {_LONGEST_LINE_BYTES >> 20} MiB; "
                "expected JSON Lines or CSV."
            )
        self.ended = not chunk
        if self.ended and self._incomplete:
            self._complete.append(bytes(self._incomplete))


class AnswerFile:
    """Collects answers in `TARGET.partial`, which is renamed to the target when complete.

    A context manager: no other process writes these answers within its block.

    Args:
        target: the output file; an older one is kept until the new one is complete.
        resume: continue after the answers of an interrupted or finished run.
        table: the format of the target; None: JSON Lines.

    Attributes:
        finished: whether the earlier answers are a finished run's, in the target.

    Raises:
        UsageError: an interrupted run left answers, and `resume` is not set; or the target is not a
            file of answers.
        ClseaveError: another process is writing it, or the folder cannot be written.
    """

    def __init__(self, target: Path, resume: bool, table: AnswerTable | None = None) -> None:
        self.target, self._resume, self._table = target, resume, table
        self.partial = target.with_name(target.name + ".partial")
        self.finished = False
        self._lock = ExitStack()

    def __enter__(self) -> AnswerFile:
        with ExitStack() as lock:
            lock.enter_context(locked_target(self.target))
            is_partial = self.partial.exists()
            if is_partial and not self._resume:
                raise UsageError(
                    f"{self.partial}: an unfinished run left it; --resume continues it, "
                    "deleting that file discards it."
                )
            is_jsonl = self._table is None  # a table is written anew
            self.finished = self._resume and is_jsonl and self.target.exists() and not is_partial
            if not self.finished and self.target.exists():
                self._require_answers()
            sweep(self.target.parent, re.escape(self.partial.name))
            self._lock = lock.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _require_answers(self) -> None:
        with writing(self.target), self.target.open("rb") as stream:
            first = stream.readline()
        names = set(_parsed(first) or ())
        if self._table is not None and first:
            names = {*self._table.header(self.target)}
        if first and "error" not in names and not {"label", "model"} <= names:
            raise UsageError(
                f"{self.target}: already exists and holds no answers; choose another --output."
            )

    def earlier(self) -> Iterator[dict[str, Any]]:
        """Yields the existing answers, then removes an incomplete line at the end of the file.

        Raises:
            DataError: a finished file is damaged; it is left unchanged.
        """
        path = self.target if self.finished else self.partial
        if not path.exists():
            return
        with writing(path), path.open("rb" if self.finished else "r+b") as stream:
            num_bytes = 0
            for number, line in enumerate(stream, start=1):
                answer = _parsed(line)
                if answer is None and self.finished:
                    raise DataError.at(
                        path, number, "damaged, not a complete answer; choose another --output, or "
                        "leave out --resume to replace that file.",
                    )  # fmt: skip
                if answer is None:
                    break
                num_bytes += len(line)
                yield answer
            if not self.finished:
                stream.truncate(num_bytes)

    def reopen(self) -> None:
        """Copies a finished file, to append to the copy."""
        with self.target.open("rb") as answers, atomic_file(self.partial) as stream:
            shutil.copyfileobj(answers, stream)
        self.finished = False

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """A stream to append answers to; if the block succeeds, the target is complete."""
        with writing(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.partial.open("ab") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
            except BaseException:
                if self.partial.exists() and not self.partial.stat().st_size:
                    self.partial.unlink()
                raise
            if self._table is None:
                self.partial.replace(self.target)
                fsync_folder(self.target.parent)
                return
            with self.partial.open("rb") as answers, atomic_file(self.target) as stream:
                self._table.write(map(json.loads, answers), stream)
            self.partial.unlink()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line as an answer; None if incomplete, or blank after a power cut."""
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
