"""How the core tells a caller what it is doing, without printing anything itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        """Counts `amount` units as done; `fields` are the latest metrics (loss, rate, …)."""


class Progress(Protocol):
    """What a use case reports to. The command line draws it; a library caller may ignore it."""

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, noted: bool = False
    ) -> Iterator[Task]:
        """Opens a piece of work, closed with the block.

        Args:
            description: what is done.
            total: number of its units; None: unknown.
            unit: their name.
            noted: whether a note of the caller's says how it went, so that nothing else need.
        """
        ...

    def note(self, message: str) -> None:
        """Something the user should know, one line."""


class _SilentTask:
    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        return


class Silent:
    """A `Progress` that keeps quiet: the default of every use case."""

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, noted: bool = False
    ) -> Iterator[Task]:
        """Opens a piece of work that nobody watches."""
        yield _SilentTask()

    def note(self, message: str) -> None:
        """Drops the message."""


SILENT = Silent()
