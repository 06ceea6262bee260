"""How many processes and cores there are, and working ahead with them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def process_count() -> int:
    """How many processes work on this command; 1 without a launcher."""
    return _number("WORLD_SIZE") or 1


def process_rank() -> int:
    """This process's number among them, from 0."""
    return _number("RANK") or 0


def local_rank() -> int | None:
    """This process's number on its machine; None without a launcher."""
    return _number("LOCAL_RANK")


def is_first_process() -> bool:
    """Whether this process is the one that speaks and writes."""
    return process_rank() == 0


def _number(name: str) -> int | None:
    """What a launcher set a variable to; one that is left over alone comes from no launcher."""
    launched = all(os.environ.get(each, "").isdecimal() for each in ("RANK", "WORLD_SIZE"))
    text = os.environ.get(name, "") if launched else ""
    return int(text) if text.isdecimal() else None


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
