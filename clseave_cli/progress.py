"""How the core reports what it is doing, without printing anything itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        """Counts `amount` more units as done; `fields` are the latest metrics (loss, rate, …)."""


class Progress(Protocol):
    """Receives reports. The command line draws them; a library caller may ignore them."""

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, summary: bool = True
    ) -> Iterator[Task]:
        """Starts a piece of work, which ends with the block.

        Args:
            description: what is being done.
            total: number of units; None: unknown.
            unit: name of the units.
            summary: whether to report the end of the work; not needed if a note does.
        """
        ...

    def note(self, message: str) -> None:
        """Reports one line that the user should read."""


class _Silent:
    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, summary: bool = True
    ) -> Iterator[Task]:
        yield self

    def advance(self, amount: int = 1, **fields: float | int | str) -> None:
        return

    def note(self, message: str) -> None:
        return


#: Ignores every report: the default of every use case.
SILENT = _Silent()
