"""What `predict` reads and writes: pairs to judge, row by row, and the answers, one a line.

Pairs come from a file of any format, or as JSON Lines or CSV down a pipe. A row that cannot be used
is handed on as a `DataError` in its place, so that one bad row does not stop the others. Answers
are JSON Lines: a run that was killed goes on after its last whole line.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import select
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    require_text,
)
from clseave_cli.core.files import atomic_file, fsync_folder, locked_target, sweep, writing
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS

#: What an answer says beside image and hypothesis.
ANSWER_KEYS = ("lang", "label", "probabilities", "model", "truncated", "error")
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
        names = header_of(lines.peek())[1]
        header = set(map(str.strip, names))
        if header & {*IMAGE_KEYS} and header & {*HYPOTHESIS_KEYS}:
            rows = iter(DelimitedRows(lines, errors="surrogateescape"))
        elif name.removesuffix(".gz").endswith((".csv", ".tsv")):
            wanted = "expected a header with the columns image and hypothesis, or SNLI-VE's."
            raise DataError.at(name, 1, NOT_UTF8 if is_garbled(names) else wanted)
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


def read_probabilities(path: Path, pair_ids: Sequence[str]) -> npt.NDArray[np.float32]:
    """(N, 3) probabilities that answers give to N rows, in the order of `labels.LABELS`.

    Args:
        path: what `predict --output` writes, or another file of rows with `pairID` and
            `probabilities`, by label or as a list. Answers to other rows are skipped.
        pair_ids: of the rows.

    Raises:
        DataError: an answer is damaged, or rows have none.
    """
    place = {pair_id: row for row, pair_id in enumerate(pair_ids)}
    table = np.full((len(pair_ids), len(LABELS)), np.nan, dtype=np.float32)
    for line, answer, _ in read_rows(path, (*ID_KEYS, "probabilities")):
        try:
            if "error" in answer:
                continue
            given = answer["probabilities"]
            triple = [float(given[label]) for label in LABELS] if isinstance(given, dict) else given
            row = place.get(require_text(answer, ID_KEYS, "the row's unique id"))
            if len(triple) != len(LABELS) or not abs(sum(triple) - 1) < 1e-3 or min(triple) < 0:
                raise ValueError
        except (BadRow, KeyError, TypeError, ValueError):
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

    Attributes:
        finished: the earlier answers are those of a run that ended, in the target.

    Raises:
        UsageError: an interrupted run left answers, and `resume` is not set; or the target is a
            file of something else.
        ClseaveError: another process is writing there, or the folder cannot be written.
    """

    def __init__(self, target: Path, resume: bool) -> None:
        self.target, self._resume = target, resume
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
            self.finished = self._resume and self.target.exists() and not there
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
        answer = _whole_answer(first) or {}
        if first and not answer.keys() & {"label", "error"}:
            raise UsageError(
                f"{self.target}: is there already and holds no answers; choose another --output."
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
            self.partial.replace(self.target)
            fsync_folder(self.target.parent)


def _whole_answer(line: bytes) -> dict[str, Any] | None:
    # After a power cut, a line may be there in length only.
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
