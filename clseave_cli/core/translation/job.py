"""One file into one language: what is missing is translated, then the file is written."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.text_files import Row, open_text_file
from clseave_cli.core.translation.driver import Driver, Outcome, Patience
from clseave_cli.core.translation.engine import Engine
from clseave_cli.core.translation.lookup import Lookup, Terms
from clseave_cli.core.translation.memory import Memory
from clseave_cli.core.translation.output import Output
from clseave_cli.core.translation.parts import can_split, write_parts
from clseave_cli.core.translation.quality import CHECKS, Checks
from clseave_cli.core.translation.work import Item, Work
from clseave_cli.errors import TranslationError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import Progress, Task


@dataclass(frozen=True)
class FileSummary:
    """What became of one file in one language.

    Attributes:
        input: the file read.
        output: the file written.
        lang: canonical code of the language.
        num_rows: rows read.
        num_from_memory: rows whose translation was in the memory before.
        num_translated: rows translated in this run.
        num_unchanged: rows without a letter, the same in every language.
        num_failed: rows left out because there is no translation; listed in `failed`.
        num_dropped: rows left out because a check found them suspect; listed in `rejected`.
        suspicions: how many rows each check found suspect, by its name.
        num_requests: calls made to the engine.
        seconds: how long it took.
        failed: list of the rows without a translation, None when there are none.
        rejected: list of the rows dropped, None when there are none.
        suspect: list of the suspect rows, where the file itself cannot mark them (plain text).
        review: the side-by-side sample, None when none was asked for.
    """

    input: Path
    output: Path
    lang: str
    num_rows: int
    num_from_memory: int
    num_translated: int
    num_unchanged: int
    num_failed: int
    num_dropped: int
    suspicions: dict[str, int]
    num_requests: int
    seconds: float
    failed: Path | None
    rejected: Path | None
    suspect: Path | None
    review: Path | None


class _Incomplete(Exception):
    """The memory does not hold everything yet."""


class Job:
    """The translation of one file, out of the memory and, for what is missing, by the engine."""

    def __init__(
        self, config: TranslateConfig, engine: Engine, memory: Memory, path: Path, output: Path
    ) -> None:
        self._config = config
        self._engine = engine
        self._memory = memory
        self._path = path
        self._output = output
        exact = engine.limits.text_characters is None
        self._terms = Terms(
            identity=memory.identity_id(engine.identity),
            source=engine.identity.source,
            target=engine.identity.target,
            by_pair_id=engine.limits.by_pair_id,
            exact=exact,
            retries_suspect=config.on_suspect == "retry" and not exact,
        )
        self._lookup = Lookup(memory, path, self._terms)
        self._file = open_text_file(path, config.field, engine.identity.source)
        self._num_hits: int | None = None
        self.outcome = Outcome()

    def run(self, progress: Progress) -> list[FileSummary]:
        """Translates and writes. Of several processes (`torchrun`), only the first one writes."""
        start = time.monotonic()
        is_first = is_first_process()
        if is_first:
            try:
                return [self._write(progress, None, start)]
            except _Incomplete:
                pass
        work = Work(self._engine.limits.by_length)
        try:
            self._gather(progress, work)
            if work.num_texts:
                self._fill(progress, work)
            return [self._write(progress, work, start)] if is_first else []
        except sqlite3.Error as error:
            raise TranslationError(
                f"the list of what is left to translate cannot be kept ({error}); "
                "is the temporary folder full? TMPDIR names another."
            ) from error
        finally:
            work.close()

    def _gather(self, progress: Progress, work: Work) -> None:
        """Queues what the memory does not hold."""
        self._num_hits = 0
        with progress.task(f"reading {self._path.name}", unit="rows") as task:
            for chunk in self._lookup.chunks(self._file):
                missing = []
                for row, entry in chunk:
                    if entry is None:
                        missing.append(Item(self._lookup.key(row) or "", 0))
                    elif not self._lookup.is_final(entry):
                        missing.append(Item(row.text, 1))
                    self._num_hits += entry is not None and entry.attempts > 0
                work.add(missing)
                task.advance(len(chunk), from_memory=self._num_hits, to_translate=work.num_texts)

    def _fill(self, progress: Progress, work: Work) -> None:
        """Has translated what is queued."""
        driver = Driver(
            self._engine,
            self._memory,
            self._terms.identity,
            Checks(self._terms.source, self._terms.target),
            Patience.of(self._config, self._engine.limits),
            self._terms.retries_suspect,
        )
        title = f"{self._path.name} into {self._engine.identity.target}"
        with progress.task(title, total=work.num_texts, unit="texts") as task:
            self.outcome = driver.run(work, _Timed(task, work.num_texts, self._num_hits or 0))

    def _write(self, progress: Progress, work: Work | None, start: float) -> FileSummary:
        """Writes the translated file and the lists that go with it.

        Raises:
            _Incomplete: only without `work`: the memory does not hold everything.
        """
        output = Output(self._file, self._path, self._output, self._config)
        with output, progress.task(f"writing {self._output.name}", unit="rows") as task:
            file, path, config = self._file, self._path, self._config
            if work is None and can_split(file, path, config):
                if not write_parts(
                    path, file, self._memory.path, self._terms, config, output, task
                ):
                    raise _Incomplete
            else:
                self._write_rows(output, task, work)
        counts = output.counts
        num_asked = counts["rows"] - counts["unchanged"] - counts["failed"]
        num_hits = num_asked if self._num_hits is None else min(self._num_hits, num_asked)
        return FileSummary(
            input=self._path,
            output=self._output,
            lang=self._engine.identity.target,
            num_rows=counts["rows"],
            num_from_memory=num_hits,
            num_translated=num_asked - num_hits,
            num_unchanged=counts["unchanged"],
            num_failed=counts["failed"],
            num_dropped=counts["dropped"],
            suspicions={name: counts[name] for name in CHECKS if counts[name]},
            num_requests=self.outcome.num_requests,
            seconds=time.monotonic() - start,
            failed=output.failed.path if counts["failed"] else None,
            rejected=output.rejected.path if counts["dropped"] else None,
            suspect=output.suspect.path if output.suspect.num_rows else None,
            review=output.review,
        )

    def _write_rows(self, output: Output, task: Task, work: Work | None) -> None:
        for chunk in self._lookup.chunks(self._file):
            if work is None and not self._lookup.is_complete(chunk):
                raise _Incomplete
            for row, entry in self._lookup.checked(chunk):
                if entry is not None:
                    output.put(row, entry)
                else:
                    output.fail(row, self._reason(row, work))
            task.advance(len(chunk))

    def _reason(self, row: Row, work: Work | None) -> str:
        noted = work.reason(self._lookup.key(row) or "") if work else None
        return noted or f"not asked: {self.outcome.stopped or 'another process gave it up'}"


class _Timed:
    """A task that also shows rate, hits, failures and time left."""

    def __init__(self, task: Task, total: int, num_hits: int) -> None:
        self._task, self._total, self._num_hits = task, total, num_hits
        self._start, self._done = time.monotonic(), 0

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        self._done += amount
        rate = self._done / max(1e-9, time.monotonic() - self._start)
        left = (self._total - self._done) / rate if self._done else 0.0
        self._task.advance(
            amount,
            per_second=rate,
            from_memory=self._num_hits,
            **fields,
            left=_duration(left) if self._done else "?",
        )


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86_400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
