"""How the core tells a caller what it is doing, without printing anything itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        """Counts `amount` units as done; `fields` are the latest figures (loss, rate, …)."""


class Progress(Protocol):
    """What a use case reports to. The command line draws it; a library caller may ignore it."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Opens a piece of work of `total` units (None: unknown); closed with the block."""
        ...

    def note(self, message: str) -> None:
        """Something the user should know, one line."""


class _SilentTask:
    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        return


class Silent:
    """A `Progress` that keeps quiet: the default of every use case."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Opens a piece of work that nobody watches."""
        yield _SilentTask()

    def note(self, message: str) -> None:
        """Drops the message."""


SILENT = Silent()
