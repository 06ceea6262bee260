"""This process: its streams and signals, and the processes, cores and threads there are."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
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


def prepare_streams() -> None:
    """Makes stdout and stderr take every text, also where they were closed or lack letters.

    A result must not be lost to a terminal that cannot show its characters.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does; a training's own handlers come before it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


#: What decides how OpenMP's threads wait, in the runtimes that torch may come with, and what
#: clseave chooses: to spin for a fraction of a millisecond. libgomp takes its own count before the
#: policy's (300,000 by default); the policy decides how briefly a process spins that has more
#: threads than there are cores (1,000 times if active, 100 times by default, which costs `align` a
#: fifth). LLVM's and Intel's runtime would never sleep if active, but for the block time, in ms.
_WAITING = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "1"}
_NUM_THREADS = "OMP_NUM_THREADS"


def spin_briefly() -> None:
    """Lets OpenMP's threads soon sleep while they wait, unless the user says how they wait.

    By default they spin for long. Beside another program that computes, each then waits for one
    that the system is not running, and torch becomes up to a hundred times slower
    (docs/experiments.md, 2026-11-26). The variables are read when torch is loaded, so this comes
    before.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ.update(_WAITING)


def use_one_thread() -> None:
    """Lets torch, not loaded yet, compute in one thread, unless the user says how many.

    For work so small that threads wait for each other longer than they compute.
    """
    os.environ.setdefault(_NUM_THREADS, "1")


def thread_policy() -> str:
    """How many threads compute and how they wait, in words."""
    count = os.environ.get(_NUM_THREADS, f"{usable_cores()} (every usable core)")
    waiting = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    return ", ".join([count, *waiting])


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
