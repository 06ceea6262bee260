"""Files that a translation leaves behind: the translated file itself and the lists beside it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.text_files import Row, TextFile, packing, split_name
from clseave_cli.core.files import atomic_file
from clseave_cli.core.translation.memory import Entry
from clseave_cli.core.translation.review import Sample

_SWEEP_AGE_SECONDS = 10.0
_BLOCK_BYTES = 1 << 20


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """`atomic_file`, which also sweeps up what killed runs left of theirs."""
    _sweep(target)
    with atomic_file(target) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # tells it from a dead run's
        yield stream


@contextmanager
def aside_folder(target: Path) -> Iterator[Path]:
    """A folder for parts of `target`, gone after the block, or swept up by a later run."""
    prefix = f".{target.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as name, _locked(Path(name)):
        yield Path(name)


def _sweep(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.*[a-z0-9_]"):
        if not re.fullmatch(r"(clseave-[0-9a-f]{8}|[a-z0-9_]{8})", path.suffix[1:]):
            continue
        try:
            with _locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB):
                if time.time() - path.stat().st_mtime <= _SWEEP_AGE_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError:
            continue  # in use, or gone


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock on a file or folder; however the process ends, the kernel lets go of it.

    Raises:
        BlockingIOError: `how` says not to wait, and somebody else holds one.
    """
    # NFS grants an exclusive lock only on what is open for writing, which a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


class RowList:
    """Rows set aside, as JSON Lines; the file exists only when there are some.

    A context manager: the list of an earlier run is replaced, or removed, when the block ends well.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._stack = ExitStack()
        self._stream: BinaryIO | None = None

    def __enter__(self) -> RowList:
        return self

    def add(self, row: Row, reason: str, **more: Any) -> None:
        """Lists a row with the reason why it is here."""
        entry = {"line": row.line, "pairID": row.pair_id, "text": row.text, **more}
        entry = {key: value for key, value in entry.items() if value is not None}
        # Escaped, because a text may hold what UTF-8 cannot (lone surrogates).
        self._open().write((json.dumps({**entry, "reason": reason}) + "\n").encode())
        self.num_rows += 1

    def join(self, part: RowList) -> None:
        """Takes over the rows of another list, which is finished."""
        if part.path.exists():
            with part.path.open("rb") as lines:
                for line in lines:
                    self._open().write(line)
                    self.num_rows += 1

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._stream = self._stack.enter_context(replacing(self.path))
        return self._stream

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if kind is None and not self.num_rows:
            self.path.unlink(missing_ok=True)


class Output:
    """One translated file under way, with its lists and its review sample; a context manager.

    Args:
        file: the file that is being translated.
        source: its path.
        target: where the translation goes.
        config: says what happens to suspect rows, and how large the sample is.

    Attributes:
        target: see above.
        counts: rows, unchanged, failed, dropped, and rows per suspicion.
        failed: the rows without a translation.
        rejected: the rows dropped because they are suspect.
        suspect: the suspect rows kept in a file that cannot mark them.
        review: the sample's path, None when there is none.
    """

    def __init__(self, file: TextFile, source: Path, target: Path, config: TranslateConfig) -> None:
        stem, _ = split_name(target)
        self._file, self.target = file, target
        self._drops = config.on_suspect == "drop"
        self._sample = Sample(config.review, config.seed, source.name) if config.review else None
        self._stack = ExitStack()
        self.counts: Counter[str] = Counter()
        self.failed = RowList(target.with_name(f"{stem}.failed.jsonl"))
        self.rejected = RowList(target.with_name(f"{stem}.rejected.jsonl"))
        self.suspect = RowList(target.with_name(f"{stem}.suspect.jsonl"))
        self.review = target.with_name(f"{stem}.review.md") if config.review else None

    def __enter__(self) -> Output:
        stream = self._stack.enter_context(replacing(self.target))
        for rows in (self.failed, self.rejected, self.suspect):
            self._stack.enter_context(rows)
        self._stream = self._stack.enter_context(packing(self.target, stream))
        self._writer = self._stack.enter_context(closing(self._file.writer(self._stream)))
        return self

    def put(self, row: Row, entry: Entry) -> None:
        """Takes a row and its translation."""
        self.counts["rows"] += 1
        if not entry.attempts:
            self.counts["unchanged"] += 1
        suspicions = entry.suspicions
        if suspicions:
            self.counts.update(suspicions)
            if self._drops:
                self.counts["dropped"] += 1
                self._list(self.rejected, row, entry)
                self._writer.leave_out(row)
                return
            if not self._file.marks_rows:
                self._list(self.suspect, row, entry)
        self._writer.write(row, entry.translation, suspicions)
        if self._sample:
            self._sample.offer(row, entry.translation, suspicions)

    def join(self, part: Output, counts: Mapping[str, int]) -> None:
        """Takes over the next rows of the same file, which another process has written."""
        with part.target.open("rb") as written:
            shutil.copyfileobj(written, self._stream, _BLOCK_BYTES)
        self.counts.update(counts)
        self.rejected.join(part.rejected)
        self.suspect.join(part.suspect)

    def fail(self, row: Row, reason: str) -> None:
        """Takes a row there is no translation for."""
        self.counts["rows"] += 1
        self.counts["failed"] += 1
        self.failed.add(row, reason)
        self._writer.leave_out(row)

    def _list(self, rows: RowList, row: Row, entry: Entry) -> None:
        rows.add(row, f"suspect: {', '.join(entry.suspicions)}", translation=entry.translation)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if kind is None and self._sample and self.review:
            self._sample.write(self.review)
