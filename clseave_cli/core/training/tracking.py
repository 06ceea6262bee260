"""Sends a run's metrics, numbers only, to TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clseave_cli.core.config import TrainingConfig
from clseave_cli.errors import ClseaveError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import Progress

TENSORBOARD_FOLDER = "tensorboard"  # beside metrics.jsonl
#: Weights & Biases would also send host, command line, git remote and terminal output.
_WANDB: dict[str, Any] = dict.fromkeys(
    ("disable_git", "silent", "x_disable_meta", "x_disable_stats"), True
)
_WANDB |= {"console": "off", "save_code": False}


def require(name: str) -> None:
    """Raises a ClseaveError if the tracker's package is not installed."""
    # Without an origin it is a folder in the working directory: wandb makes one of its name.
    if name != "none" and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ClseaveError(
            f"--tracker {name}: the package {name} is not installed; pip install -e '.[{name}]'."
        )


@contextmanager
def tracker(
    config: TrainingConfig, title: str, folder: Path, first_step: int, progress: Progress
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Yields a function that sends a record of `metrics.jsonl`; does nothing after a failure."""
    calls: list[Callable[..., Any]] = []  # one logs a step, the other closes the tracker

    def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with redirect_stdout(io.StringIO()):  # stdout is for the command's result
                return call(*arguments)
        except Exception as error:  # whatever it is, training must not stop
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            advice = "the run continues without it; metrics.jsonl has everything."
            progress.note(f"--tracker {config.tracker}: failed ({reason}); {advice}")
            calls.clear()

    if config.tracker != "none" and is_first_process():  # several processes are one run
        calls += attempt(_open, config, title, folder, first_step) or ()

    try:
        yield lambda record: [attempt(c, record["step"], _numbers(record)) for c in calls[:1]]
    finally:
        for close in calls[1:]:
            attempt(close)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, dev metrics as `dev/name`."""
    dev = {f"dev/{name}": value for name, value in record.get("dev", {}).items()}
    return {k: v for k, v in (record | dev).items() if isinstance(v, int | float) and k != "step"}


def _open(config: TrainingConfig, title: str, folder: Path, first_step: int) -> Any:
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an interrupted run wrote after its last state.
        writer: Any = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step)
        return lambda step, n: [writer.add_scalar(*item, step) for item in n.items()], writer.close
    service: Any = importlib.import_module(config.tracker)
    settings = {"settings": service.Settings(**_WANDB)} if config.tracker == "wandb" else {}
    project = os.environ.get("WANDB_PROJECT") or "clseave"
    run = service.init(project=project, name=title, config=_numbers(asdict(config)), **settings)
    return lambda step, numbers: run.log(numbers, step=step), run.finish
