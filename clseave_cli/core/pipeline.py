"""Doing the next pieces of work while the current one is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """How many cores this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ahead(
    executor: Executor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_ahead: int,
) -> Iterator[Result]:
    """`function` of every item in order, with up to `num_ahead` computed before they are asked for.

    Unlike `Executor.map`, it never holds more than that many results.
    """
    pending = deque(executor.submit(function, item) for item in items[:num_ahead])
    for number in range(len(items)):
        result = pending.popleft().result()
        if number + num_ahead < len(items):
            pending.append(executor.submit(function, items[number + num_ahead]))
        yield result
