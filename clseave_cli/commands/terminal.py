"""What the user sees: progress and notes on stderr, results on stdout.

Of several processes (`torchrun`) only the first one speaks, errors apart.
"""

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

#: Control characters, which would reach into the terminal; a line break and a tab may.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text with its control characters spelled out, as ids and paths of data may hold some."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# Consoles are made on first use: `clseave --help` must not wait for rich.
@functools.cache
def stdout() -> Console:
    """Where results go."""
    return make_console(stderr=False)


@functools.cache
def stderr() -> Console:
    """Where progress and notes go."""
    return make_console(stderr=True)


def make_console(*, stderr: bool, **settings: Any) -> Console:
    """A console of rich's that prints no control characters of data."""
    from rich.console import Console

    class PrintableConsole(Console):
        """Every text passes here, cells of tables too."""

        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(printable(text), **settings)

        def on_broken_pipe(self) -> None:
            """Leaves it to `main`, which ends quietly; rich would exit with 1."""
            raise BrokenPipeError(errno.EPIPE, "the reader went away")

    quiet = not is_first_process()
    return PrintableConsole(stderr=stderr, highlight=False, quiet=quiet, **settings)


def say(message: str, *, to_stderr: bool = False) -> None:
    """Prints a text as it is; on stderr, a terminal gets it broken between words.

    Paths and URLs stay whole, and results can be copied as they are.
    """
    console = stderr() if to_stderr else stdout()
    if to_stderr and console.is_terminal:
        lines = message.splitlines()
        message = "\n".join(
            textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
            for line in lines
        )
    console.print(message, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints exactly one JSON document on stdout, escaped where it cannot show a character.

    Paths become texts.

    Raises:
        ClseaveError: a number in it is not finite.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False, default=str)
    except ValueError:
        raise ClseaveError(
            "a number of the result is not finite; are the models damaged?"
        ) from None
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=str)
    sys.stdout.write(text + "\n")


def _metrics(fields: dict[str, float | int | str]) -> str:
    texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in fields.items()}
    return " · ".join(f"{name.replace('_', ' ')} {text}" for name, text in texts.items())


class _Task:
    """A piece of work: counted here, and drawn as a bar where there are bars."""

    def __init__(self, description: str, total: int | None, unit: str, bars: Progress | None):
        self._description, self._total, self._unit = printable(description), total, unit
        self._done, self._fields = 0, ""
        self._start = self._last = time.monotonic()
        # When the first report came, and what it counted: maybe work of an earlier sitting.
        self._first: tuple[float, int] | None = None
        self._bars = bars
        self.bar: TaskID | None = None
        if bars is not None:
            self.bar = bars.add_task(self._description, total=total, details="")

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        self._first = self._first or (time.monotonic(), amount)
        self._done += amount
        self._fields = _metrics(fields) or self._fields
        if self._bars is not None and self.bar is not None:
            line = self._line(self._time_left())
            self._bars.update(self.bar, completed=self._done, details=line)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            say(f"{self._description}: {self._line(self._time_left())}", to_stderr=True)

    def _line(self, time_text: str) -> str:
        """How far it is, a time, and the latest metrics."""
        of = f"/{self._total}" if self._total is not None else ""
        done = f"{self._done}{of} {self._unit}".strip()
        return " · ".join(part for part in (done, time_text, self._fields) if part)

    def end(self) -> None:
        """Says that it is done."""
        line = self._line(f"in {_clock(time.monotonic() - self._start)}")
        say(f"{self._description}: {line}", to_stderr=True)

    def _time_left(self) -> str:
        """Empty where nothing is left, or too little is counted to tell."""
        if self._first is None or self._total is None or self._done >= self._total:
            return ""
        begun, before = self._first
        if self._done == before:
            return ""
        rate = (self._done - before) / (time.monotonic() - begun)
        return f"{_clock((self._total - self._done) / rate)} left" if rate else ""


def _clock(seconds: float) -> str:
    """A time in hours, minutes and seconds: 0:01:23."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class TerminalProgress:
    """A `progress.Progress`: bars on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, summary: bool = True
    ) -> Iterator[Task]:
        """Draws one piece of work until the block ends; then a line stands for it.

        A bar leaves nothing behind, whether the work is done or interrupted.
        """
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
        """The bars, where there are some, and whether this work is what opened them."""
        if self._bars is not None or not stderr().is_terminal:
            yield self._bars, False
            return
        from rich import progress

        # The numbers come first: a bar is drawn only where it cuts none of them.
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
        """Prints a line above the bars."""
        say(message, to_stderr=True)


def print_training(folder: Path, training: TrainingResult | None) -> None:
    """Prints where a model lies and how its training went."""
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
