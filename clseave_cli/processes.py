"""Settings of this process: its rank, streams, signals, cores and threads."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def process_count() -> int:
    """The number of processes that share this command's work; 1 without a launcher."""
    return _launcher_value("WORLD_SIZE") or 1


def process_rank() -> int:
    """This process's rank among them, from 0."""
    return _launcher_value("RANK") or 0


def local_rank() -> int | None:
    """This process's rank on its machine; None without a launcher."""
    return _launcher_value("LOCAL_RANK")


def is_first_process() -> bool:
    """Whether this process is rank 0, the one that prints and writes."""
    return process_rank() == 0


def _launcher_value(name: str) -> int | None:
    """A number set by a launcher, which always sets RANK and WORLD_SIZE, too."""
    values = [os.environ.get(each, "") for each in ("RANK", "WORLD_SIZE", name)]
    return int(values[-1]) if all(value.isdecimal() for value in values) else None


def usable_cores() -> int:
    """The number of cores this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_streams() -> None:
    """Makes stdout and stderr accept any text, even if closed or in a limited encoding.

    A result must not be lost because a terminal cannot display its characters.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - stays open
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM end a command as Ctrl-C does, unless a stage installs its own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install signal handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


#: How OpenMP's threads wait, in each runtime that torch may use: they spin for a fraction of a
#: millisecond, then sleep. libgomp's spin count (default 300,000) applies as long as there are no
#: more threads than cores. With more, the policy sets the count: 1,000 if active, 100 by default,
#: which costs `align` a fifth. LLVM's and Intel's runtimes, if active, sleep only after the block
#: time, in ms.
_WAITING = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "1"}
_NUM_THREADS = "OMP_NUM_THREADS"


def spin_briefly() -> None:
    """Makes idle OpenMP threads go to sleep soon, unless the user has set how they wait.

    By default they spin for long. If another program computes at the same time, each then waits for
    a thread that is not scheduled, and torch is up to a hundred times slower (docs/experiments.md,
    2026-11-26). Call this before torch is loaded, which reads the variables.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ.update(_WAITING)


def use_one_thread() -> None:
    """Makes torch, not loaded yet, use one thread, unless the user has set a number.

    For work so small that threads spend longer waiting for each other than computing.
    """
    os.environ.setdefault(_NUM_THREADS, "1")


def thread_policy() -> str:
    """The number of threads and how they wait, in words."""
    count = os.environ.get(_NUM_THREADS, f"{usable_cores()} (every usable core)")
    return ", ".join([count, *(f"{n}={os.environ[n]}" for n in _WAITING if n in os.environ)])


def ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int
) -> Iterator[Result]:
    """`function` of every item in order, with up to `num_ahead` computed in advance.

    Unlike `Executor.map`, it never holds more results than that.
    """
    rest = iter(items)
    pending = deque(executor.submit(function, item) for item in islice(rest, num_ahead))
    while pending:
        result = pending.popleft().result()
        pending.extend(executor.submit(function, item) for item in islice(rest, 1))
        yield result
