"""What the user sees: progress and notes on stderr, results on stdout.

Of several processes (`torchrun`) only the first one speaks, errors apart.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clseave_cli.processes import is_first_process
from clseave_cli.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from clseave_cli.core.training.loop import TrainingResult

_LINE_SECONDS = 10.0


# Consoles are made on first use: `clseave --help` must not wait for rich.
@functools.cache
def stdout() -> Console:
    """Where results go."""
    from rich.console import Console

    return Console(highlight=False, quiet=not is_first_process())


@functools.cache
def stderr() -> Console:
    """Where progress and notes go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not is_first_process())


def print_json(value: Any) -> None:
    """Prints exactly one JSON document on stdout, escaped where it cannot show a character."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def _figures(fields: dict[str, float | int | str]) -> str:
    shown = []
    for name, value in fields.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        shown.append(f"{name.replace('_', ' ')} {text}")
    return " · ".join(shown)


class _BarTask:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        self._bars.update(self._task, advance=amount)
        if fields:
            self._bars.update(self._task, figures=_figures(fields))


class _LineTask:
    """Plain lines for logs and pipes: one at most every ten seconds, and one at the end."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._fields = 0, ""
        self._start = self._last = time.monotonic()
        # When the first report came, and what it counted: maybe work of an earlier sitting.
        self._first: tuple[float, int] | None = None

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        self._first = self._first or (time.monotonic(), amount)
        self._done += amount
        self._fields = _figures(fields) or self._fields
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self.line()

    def line(self) -> None:
        of = f"/{self._total}" if self._total is not None else ""
        parts = [
            f"{self._done}{of} {self._unit}".strip(),
            _clock(time.monotonic() - self._start),
        ]
        if (seconds_left := self._seconds_left()) is not None:
            parts.append(f"{_clock(seconds_left)} left")
        if self._fields:
            parts.append(self._fields)
        stderr().print(f"{self._description}: " + " · ".join(parts), soft_wrap=True, markup=False)

    def _seconds_left(self) -> float | None:
        """None where nothing is left, or too little is known."""
        if self._first is None or self._total is None or self._done >= self._total:
            return None
        begun, before = self._first
        if self._done == before:
            return None
        return (self._total - self._done) * (time.monotonic() - begun) / (self._done - before)


def _clock(seconds: float) -> str:
    """As the bars show times: 0:01:23."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class TerminalProgress:
    """A `progress.Progress`: bars on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Draws one piece of work until the block ends."""
        if not stderr().is_terminal:
            line_task = _LineTask(description, total, unit)
            yield line_task
            line_task.line()
            return
        from rich import progress

        outermost = self._bars is None
        if self._bars is None:
            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[unit]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("[dim]{task.fields[figures]}"),
                console=stderr(),
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(description, total=total, unit=unit, figures="")
        try:
            yield _BarTask(bars, task)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def note(self, message: str) -> None:
        """Prints a line above the bars."""
        (self._bars.console if self._bars else stderr()).print(
            message, soft_wrap=True, markup=False
        )


def print_training(folder: Path, training: TrainingResult | None) -> None:
    """Prints where a model lies and how its training went."""
    if training is None:
        stdout().print(f"{folder}: complete", soft_wrap=True, markup=False)
        return
    from clseave_cli.core.training.loop import overall

    dev = ", ".join(f"{name} {value:.4g}" for name, value in overall(training.dev).items())
    stdout().print(
        f"{folder}: epoch {training.best_epoch} of {training.epochs} kept (dev {dev}) · "
        f"{training.wall_seconds:.0f} s, {training.pairs_per_second:.0f} pairs/s",
        soft_wrap=True,
        markup=False,
    )
