"""What `predict` reads and writes: pairs to judge, row by row, and the answers in their order.

Pairs come from a file of any format, or as JSON Lines or CSV down a pipe. A row that cannot be used
is handed on as a `DataError` in its place, so that one bad row does not stop the others. Until all
answers are there, they are JSON Lines: a run that was killed goes on after its last whole line.
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

#: What an answer says beside image and hypothesis.
ANSWER_KEYS = ("lang", "label", "probabilities", "model", "truncated", "warning", "error")
#: The same as columns of a table.
ANSWER_COLUMNS = ("lang", "label", *LABELS, "model", "truncated", "warning", "error")
# Where a row has the keys of `predict` beside those of a data set, `predict`'s count.
_IMAGE_KEYS, _HYPOTHESIS_KEYS = IMAGE_KEYS[::-1], HYPOTHESIS_KEYS[::-1]
_ENDINGS = {"csv": (".csv", ".tsv"), "parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
_PARQUET_ROWS = 1024
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 16 << 20


class Pair(NamedTuple):
    """An image, as its row names it, and a sentence about it; `others` go with the answer."""

    image: str
    hypothesis: str
    others: dict[str, Any]


class Pairs:
    """The rows of a stream in order, in batches.

    A batch is smaller than `size` only at the end, or where the next row is not there yet: a
    program that writes one row and waits for the answer gets it.

    Args:
        stream: a file or pipe. Parquet by its name; CSV where the first line names columns for
            image and hypothesis; JSON Lines otherwise. Empty lines are skipped.
        name: what messages call it; packed where it ends in `.gz`.
        size: most rows in a batch.
        columns: of the image's name and the hypothesis; None: the first usual one that is there.

    Attributes:
        whole: a pair's `others` are all its columns, as a table needs them, image and hypothesis
            included; None: where the stream is CSV.
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
        if all(set(names).intersection(keys) for keys in (self._image_keys, self._text_keys)):
            return "csv"
        if self.name.removesuffix(".gz").endswith((".csv", ".tsv")):
            wanted = (
                "expected a header with the columns image and hypothesis, or SNLI-VE's; "
                f"--image-column and --text-column name others (there: {', '.join(names)[:200]})."
            )
            raise DataError.at(self.name, 1, NOT_UTF8 if is_garbled(names) else wanted)
        return "jsonl"

    def __iter__(self) -> Iterator[list[Pair | DataError]]:
        if self.format == "parquet":
            self._lines.ended = True
            rows = parquet_rows(self._stream, Path(self.name), None)
        elif self.format == "csv":
            rows = iter(DelimitedRows(self._lines, errors="surrogateescape"))
        else:
            rows = json_rows(self._lines)
        if self.whole is None:
            self.whole = self.format == "csv"
        size, lines = self._size, self._lines
        pairs = (self._pair(values, line) for line, values, _ in rows)
        for pair in pairs:
            batch = [pair]
            while len(batch) < size and lines.ready and (more := next(pairs, None)) is not None:
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
        # What an answer has already, or something else of that name.
        taken = {*ANSWER_KEYS, *ANSWER_COLUMNS}
        if not self.whole:
            taken |= {*IMAGE_KEYS, *HYPOTHESIS_KEYS, *self._image_keys, *self._text_keys}
        others = {key: value for key, value in row.items() if key not in taken}
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
    """Answers as a table: the columns of the input, then those of `ANSWER_COLUMNS`.

    Attributes:
        columns: of CSV.
        delimiter: between its cells.
        source: the input, if it is Parquet.
    """

    columns: list[str] = field(default_factory=list)
    delimiter: str = ","
    source: Path | None = None

    @classmethod
    def of(cls, pairs: Pairs, target: Path | None) -> AnswerTable | None:
        """The table that the target's name asks for, or else the input is; None: JSON Lines.

        Raises:
            UsageError: the target (None: a stream) is to be another kind of table than the input.
        """
        ending = target.suffix.lower() if target is not None else ""
        if ending == ".gz":
            raise UsageError(f"{target}: answers are not packed; leave .gz out of the name.")
        wanted = next((kind for kind, those in _ENDINGS.items() if ending in those), pairs.format)
        if wanted == "jsonl" or (wanted == "parquet" and target is None):
            return None
        if wanted != pairs.format:
            raise UsageError(
                f"{target}: {pairs.name} is no table of this kind; name the answers .jsonl."
            )
        if wanted == "parquet":
            return cls(source=Path(pairs.name))
        delimiter, names = pairs.header
        delimiter = {".csv": ",", ".tsv": "\t"}.get(ending, delimiter)
        columns = [name for name in names if name not in ANSWER_COLUMNS]
        columns += ["gold_label"] if _holds_gold_labels(names) else []
        return cls([*columns, *ANSWER_COLUMNS], delimiter)

    def encode(self, answers: Iterable[dict[str, Any]], with_header: bool = False) -> bytes:
        """Some rows of CSV."""
        text = io.StringIO()
        writer = csv.writer(text, delimiter=self.delimiter, lineterminator="\n")
        if with_header:
            writer.writerow(self.columns)
        for answer in answers:
            cells = (answer.get(name) for name in self.columns)
            writer.writerow(["true" if cell is True else cell for cell in cells])
        return text.getvalue().encode(errors="surrogateescape")

    def write(self, answers: Iterator[dict[str, Any]], stream: BinaryIO) -> None:
        """The whole table."""
        if self.source is None:
            stream.write(self.encode((), with_header=True))
            stream.writelines(self.encode([answer]) for answer in answers)
            return
        import pyarrow
        import pyarrow.parquet

        kinds = {"truncated": pyarrow.bool_(), **dict.fromkeys(LABELS, pyarrow.float64())}
        fields = [pyarrow.field(n, kinds.get(n, pyarrow.string())) for n in ANSWER_COLUMNS]
        with reading_parquet(self.source, self.source) as file:
            there = {field.name: field for field in file.schema_arrow}
            kept = [field for name, field in there.items() if name not in ANSWER_COLUMNS]
            if _holds_gold_labels(there):
                fields.insert(0, there["label"].with_name("gold_label"))
            schema = pyarrow.schema([*kept, *fields])
            with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[f.name for f in kept]):
                    some = list(islice(answers, batch.num_rows))
                    added = pyarrow.Table.from_pylist(some, pyarrow.schema(fields))
                    columns = [*batch.columns, *added.columns]
                    writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    def header(self, path: Path) -> list[str]:
        """The names of the columns of such a table."""
        if self.source is not None:
            with reading_parquet(path, path) as file:
                return list(file.schema_arrow.names)
        with path.open("rb") as stream:
            return header_of(stream.readline())[1]


def _holds_gold_labels(names: Iterable[str]) -> bool:
    """Whether the column `label` is one of the data, which the answer's would replace."""
    others = {"gold_label", "probabilities", *LABELS}
    return "label" in names and others.isdisjoint(names)


def read_probabilities(path: Path, pair_ids: Sequence[str]) -> npt.NDArray[np.float32]:
    """(N, 3) probabilities that answers give to N rows, in the order of `labels.LABELS`.

    Args:
        path: what `predict --output` writes, or another file of rows with `pairID` and a column
            for each label, or `probabilities`, by label or as a list. Other rows are skipped.
        pair_ids: of the rows.

    Raises:
        DataError: an answer is damaged, or rows have none.
    """
    place = {pair_id: row for row, pair_id in enumerate(pair_ids)}
    table = np.full((len(pair_ids), len(LABELS)), np.nan, dtype=np.float32)
    for line, answer, _ in read_rows(path, (*ID_KEYS, "probabilities", "error", *LABELS)):
        try:
            if answer.get("error"):
                continue
            given = answer.get("probabilities") or answer
            triple = [float(given[label]) for label in LABELS] if isinstance(given, dict) else given
            row = place.get(require_text(answer, ID_KEYS, "the row's unique id"))
            if len(triple) != len(LABELS) or not abs(sum(triple) - 1) < 1e-3 or min(triple) < 0:
                raise ValueError
        except (BadRow, AttributeError, KeyError, TypeError, ValueError):
            raise DataError.at(
                path, line, "expected pairID and the probabilities of three labels, which add up "
                "to 1, as `clseave predict --output` writes them.",
            ) from None  # fmt: skip
        if row is not None:
            table[row] = triple
    lacking = np.flatnonzero(np.isnan(table[:, 0]))
    if len(lacking):
        raise DataError(
            f"{path}: no probabilities for {len(lacking)} of {len(pair_ids)} training rows, such "
            f"as pairID {pair_ids[lacking[0]]!r}; let `clseave predict` answer the training file."
        )
    return table


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


class AnswerFile:
    """Collects answers in `TARGET.partial`, which takes the target's name when all are there.

    A context manager: in its block no other process writes these answers.

    Args:
        target: the file that will hold the answers; an older one stays until then.
        resume: go on with what an interrupted run left, or after what a finished one wrote.
        table: the form of the target; None: JSON Lines.

    Attributes:
        finished: the earlier answers are those of a run that ended, in the target.

    Raises:
        UsageError: an interrupted run left answers, and `resume` is not set; or the target is a
            file of something else.
        ClseaveError: another process is writing there, or the folder cannot be written.
    """

    def __init__(self, target: Path, resume: bool, table: AnswerTable | None = None) -> None:
        self.target, self._resume, self._table = target, resume, table
        self.partial = target.with_name(target.name + ".partial")
        self.finished = False
        self._lock = ExitStack()

    def __enter__(self) -> AnswerFile:
        with ExitStack() as lock:
            lock.enter_context(locked_target(self.target))
            there = self.partial.exists()
            if there and not self._resume:
                raise UsageError(
                    f"{self.partial}: an unfinished run lies there; --resume continues it, "
                    "deleting that file forgets it."
                )
            is_jsonl = self._table is None  # a finished table is made again
            self.finished = self._resume and is_jsonl and self.target.exists() and not there
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
        names = set(_whole_answer(first) or ())
        if self._table is not None and first:
            names = {*self._table.header(self.target)}
        if first and "error" not in names and not {"label", "model"} <= names:
            raise UsageError(
                f"{self.target}: already exists and holds no answers; choose another --output."
            )

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The answers to go on after; at the end, what an interruption tore is cut off the file.

        Raises:
            DataError: a finished file is damaged; nothing is cut off it.
        """
        path = self.target if self.finished else self.partial
        if not path.exists():
            return
        with writing(path), path.open("rb" if self.finished else "r+b") as stream:
            whole = 0
            for number, line in enumerate(stream, start=1):
                answer = _whole_answer(line)
                if answer is None and self.finished:
                    raise DataError.at(
                        path,
                        number,
                        "damaged, not a whole answer; choose another --output, or leave out "
                        "--resume to replace that file.",
                    )
                if answer is None:
                    break
                whole += len(line)
                yield answer
            if not self.finished:
                stream.truncate(whole)

    def reopen(self) -> None:
        """Takes a finished file's answers over, to write further ones after them."""
        # A copy: the finished file stays whole until there is a longer one.
        with self.target.open("rb") as answers, atomic_file(self.partial) as stream:
            shutil.copyfileobj(answers, stream)
        self.finished = False

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Where to write further answers; once the block ends well, the target is complete."""
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


def _whole_answer(line: bytes) -> dict[str, Any] | None:
    # After a power cut, a line may be there in length only.
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
