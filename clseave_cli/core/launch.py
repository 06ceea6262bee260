"""What `torchrun` and `accelerate launch` tell each of the processes they start."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes work on this command; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def process_rank() -> int:
    """This process's number among them, from 0."""
    return _number("RANK", 0)


def local_rank() -> int | None:
    """This process's number on its machine; None without a launcher."""
    return _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None


def is_first_process() -> bool:
    """Whether this process is the one that speaks and writes."""
    return process_rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
