"""Prints results on stdout, and progress and notes on stderr; under `torchrun`, on rank 0 only."""

from __future__ import annotations

import errno
import functools
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clseave_cli.errors import ClseaveError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from clseave_cli.core.training.loop import TrainingResult

_LINE_SECONDS = 10.0

#: Characters that control a terminal, except line breaks and tabs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text with control characters escaped: ids and paths in data may contain them."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# Consoles are created on first use: `clseave --help` must not wait for rich.
@functools.cache
def stdout() -> Console:
    return make_console(stderr=False)


@functools.cache
def stderr() -> Console:
    return make_console(stderr=True)


def make_console(*, stderr: bool, **settings: Any) -> Console:
    """A rich console that escapes control characters."""
    from rich.console import Console

    class PrintableConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:  # also for cells of tables
            return super().render_str(printable(text), **settings)

        def on_broken_pipe(self) -> None:  # `main` ends quietly; rich would exit with 1
            raise BrokenPipeError(errno.EPIPE, "the reader closed the pipe")

    quiet = not is_first_process()
    settings |= {"highlight": False, "emoji": False}  # emoji: ":cat:" in data is no cat
    return PrintableConsole(stderr=stderr, quiet=quiet, **settings)


def say(message: str, *, to_stderr: bool = False) -> None:
    """Prints a text; on stderr, a terminal gets it wrapped between words, never within a path."""
    console = stderr() if to_stderr else stdout()
    if to_stderr and console.is_terminal:
        message = "\n".join(
            textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
            for line in message.splitlines()
        )
    console.print(message, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints one JSON document, paths as strings; raises `ClseaveError` for NaN or infinity."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False, default=str)
    except ValueError:
        raise ClseaveError("a result is not finite; are the models damaged?") from None
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # the encoding lacks some letters
        text = json.dumps(value, indent=2, default=str)
    sys.stdout.write(text + "\n")


class _Task:
    """Counts a piece of work, and draws it as a bar or in lines."""

    def __init__(self, description: str, total: int | None, unit: str, bars: Progress | None):
        self._description, self._total, self._unit = printable(description), total, unit
        self._done, self._metrics = 0, ""
        self._start = self._last_line = time.monotonic()
        # Time and amount of the first report, which may count the work of an interrupted run.
        self._first: tuple[float, int] | None = None
        self._bars = bars
        self.bar: TaskID | None = None
        if bars is not None:
            self.bar = bars.add_task(self._description, total=total, details="")

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        self._first = self._first or (time.monotonic(), amount)
        self._done += amount
        if fields:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in fields.items()}
            self._metrics = " · ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items())
        if self._bars is not None and self.bar is not None:
            line = self._line(self._time_left())
            self._bars.update(self.bar, completed=self._done, details=line)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self._description}: {self._line(self._time_left())}", to_stderr=True)

    def _line(self, time_text: str) -> str:
        total = f"/{self._total}" if self._total is not None else ""
        count = f"{self._done}{total}"
        done = f"{count} {self._unit.removesuffix('s') if count == '1' else self._unit}".strip()
        return " · ".join(filter(None, (done, time_text, self._metrics)))

    def end(self) -> None:
        line = self._line(f"in {_clock(time.monotonic() - self._start)}")
        say(f"{self._description}: {line}", to_stderr=True)

    def _time_left(self) -> str:
        """Empty if there is no estimate."""
        if self._first is None or self._total is None or self._done >= self._total:
            return ""
        start, done_before = self._first
        if self._done == done_before:
            return ""
        seconds_each = (time.monotonic() - start) / (self._done - done_before)
        return f"{_clock((self._total - self._done) * seconds_each)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"  # 25:00:00 after a day


class TerminalProgress:
    """A `progress.Progress`: bars on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, summary: bool = True
    ) -> Iterator[Task]:
        """Draws a piece of work until the block ends; completed work leaves one line."""
        with self._drawn() as (bars, is_outermost):
            task = _Task(description, total, unit, bars)
            try:
                yield task
            finally:
                if bars is not None and task.bar is not None:
                    bars.remove_task(task.bar)
        if summary and (is_outermost or bars is None):
            task.end()

    @contextmanager
    def _drawn(self) -> Iterator[tuple[Progress | None, bool]]:
        """The bars, if stderr is a terminal, and whether this task opened them."""
        if self._bars is not None or not stderr().is_terminal:
            yield self._bars, False
            return
        from rich import progress

        # Numbers take precedence: a narrow terminal gets no bar.
        bar = [progress.BarColumn(bar_width=16)] if stderr().width >= 100 else []
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}: {task.fields[details]}", markup=False),
            *bar,
            console=stderr(),
            transient=True,
        )
        try:
            with self._bars:
                yield self._bars, True
        finally:
            self._bars = None

    def note(self, message: str) -> None:
        say(message, to_stderr=True)


def print_training(folder: Path, training: TrainingResult | None) -> None:
    """Prints the folder of a model and a summary of its training."""
    if training is None:
        say(f"{folder}: complete")
        return
    from clseave_cli.core.training.loop import overall

    dev = ", ".join(f"{name} {value:.4g}" for name, value in overall(training.dev).items())
    early = ", stopped early" if training.stopped_early else ""
    say(
        f"{folder}: epoch {training.best_epoch} of {training.epochs} kept{early} (dev {dev}) · "
        f"{training.wall_seconds:.0f} s, {training.pairs_per_second:.0f} pairs/s"
    )
    if training.epochs_to_95:
        lang, epoch = max(training.epochs_to_95.items(), key=lambda item: item[1])
        say(f"95 % of the last recall at 10 by epoch {epoch} in the slowest language, {lang}")
