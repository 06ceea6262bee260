"""A large file whose translations are all known, written by several processes.

Looking rows up and writing them is work for a core, not for a disk. The lines are cut into parts of
equal size; for each one a process of its own does what the first would have done alone, into a
folder beside the output, and the parts are joined in their order.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TextIO, TypeGuard

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.rows import Record, json_rows
from clseave_cli.core.data.text_files import JsonLinesFile, TextFile
from clseave_cli.core.files import read_json, write_json
from clseave_cli.core.translation.lookup import Lookup, Terms
from clseave_cli.core.translation.memory import Memory
from clseave_cli.core.translation.output import Output, aside_folder
from clseave_cli.errors import ClseaveError
from clseave_cli.processes import usable_cores
from clseave_cli.progress import Task

#: Smaller files are written before another process has started.
_LEAST_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
#: File in which a process leaves what it counted, beside its part.
_COUNTS = "counts.json"
#: What a process says instead of a number of rows.
_FAILED = "failed\n"


class Span(NamedTuple):
    """Consecutive lines of a file: where they start, in bytes and as a line number from 1."""

    start: int
    first_line: int
    num_lines: int


class _Part(JsonLinesFile):
    """Some lines of an unpacked file."""

    def __init__(self, path: Path, field: str, source: str, span: Span) -> None:
        super().__init__(path, field, source)
        self._span = span

    def _records(self, stream: BinaryIO) -> Iterator[Record]:
        stream.seek(self._span.start)
        lines = itertools.islice(stream, self._span.num_lines)
        return json_rows(lines, self._span.first_line)


def spans(path: Path, count: int) -> list[Span]:
    """The lines of a file, cut into at most `count` parts of about the same size."""
    size = path.stat().st_size
    cuts, line = [0], 1
    found: list[Span] = []
    with path.open("rb") as stream:
        for number in range(1, count):
            stream.seek(number * size // count)
            stream.readline()
            cuts.append(stream.tell())
        for start, end in zip(cuts, [*cuts[1:], size], strict=True):
            stream.seek(start)
            num_lines = 0
            while left := end - stream.tell():
                block = stream.read(min(_BLOCK_BYTES, left))
                num_lines += block.count(b"\n")
            num_lines += end == size  # the last line may do without a line break
            found.append(Span(start, line, num_lines))
            line += num_lines
    return found


class _Order(NamedTuple):
    """What a process is told to write; plain values."""

    path: str
    field: str
    span: tuple[int, int, int]
    memory: str
    terms: tuple[int, str, str, bool, bool, bool]
    on_suspect: Literal["keep", "retry", "drop"]
    target: str


def can_split(file: TextFile, path: Path, config: TranslateConfig) -> TypeGuard[JsonLinesFile]:
    """Whether a file is large enough, and of a kind, for parts of it to be written apart."""
    return (
        isinstance(file, JsonLinesFile)
        and path.suffix != ".gz"
        and path.stat().st_size >= _LEAST_BYTES
        and _num_processes() > 1
        and not config.review  # the sample is drawn from all rows in turn
    )


def _num_processes() -> int:
    return usable_cores()


def write_parts(
    path: Path,
    file: JsonLinesFile,
    memory: Path,
    terms: Terms,
    config: TranslateConfig,
    output: Output,
    task: Task,
) -> bool:
    """Writes all rows of a file into `output`, out of the memory alone.

    Args:
        path: the file to be translated.
        file: the same, opened.
        memory: the translation memory.
        terms: how rows are looked up in it.
        config: says what happens to suspect rows.
        output: where the rows go.
        task: told how many are done.

    Returns:
        False, with nothing in `output`, where the memory does not hold a row or a process failed:
        whoever asks writes the file alone then, and finds out why.
    """
    with aside_folder(output.target) as folder:
        orders = [
            _Order(
                str(path), file.field, span, str(memory), terms, config.on_suspect,
                str(folder / str(number) / output.target.name),
            )
            for number, span in enumerate(spans(path, _num_processes()))
            if span.num_lines
        ]  # fmt: skip
        if not _run(orders, task):
            return False
        for order in orders:
            part = Output(file, path, Path(order.target), config)
            output.join(part, read_json(part.target.with_name(_COUNTS)))
    return True


def _run(orders: list[_Order], task: Task) -> bool:
    """A process for each order; whether all of them did what they were told."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as reports, contextlib.ExitStack() as stack:
        with os.fdopen(writing, "w"):
            processes = [stack.enter_context(_started(order, writing)) for order in orders]
        for report in reports:
            if report == _FAILED:
                return False
            task.advance(int(report))
        return all(process.wait() == 0 for process in processes)


@contextlib.contextmanager
def _started(order: _Order, reports: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works on an order, and is ended with the block at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, str(reports), json.dumps(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[reports],
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _write(order: _Order, reports: TextIO) -> None:
    """What each process does; reports how many rows are done as it goes."""
    path, target, terms = Path(order.path), Path(order.target), Terms(*order.terms)
    file = _Part(path, order.field, terms.source, Span(*order.span))
    with Memory(Path(order.memory)) as memory:
        lookup = Lookup(memory, path, terms)
        output = Output(file, path, target, TranslateConfig(on_suspect=order.on_suspect))
        with output:
            for chunk in lookup.chunks(file):
                if not lookup.is_complete(chunk):
                    raise ClseaveError(f"{path}: the memory does not hold every row.")
                for row, entry in lookup.checked(chunk):
                    assert entry is not None
                    output.put(row, entry)
                reports.write(f"{len(chunk)}\n")
        write_json(target.with_name(_COUNTS), output.counts)


def _main() -> None:
    gc.disable()  # millions of small tuples, none of them in a cycle
    descriptor, order = sys.argv[1:]
    with os.fdopen(int(descriptor), "w", buffering=1) as reports:
        try:
            _write(_Order(*json.loads(order)), reports)
        except BaseException:
            reports.write(_FAILED)
            raise


if __name__ == "__main__":
    _main()
