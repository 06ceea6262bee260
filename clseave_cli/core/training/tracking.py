"""Trackers: the figures of a run in TensorBoard, Weights & Biases or trackio as well.

`metrics.jsonl` is the record; a tracker is a second place to look at it. So nothing a tracker does
ends a run, and nothing but numbers reaches one: no path, name, environment or command line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from clseave_cli.core.config import TrainingConfig
from clseave_cli.errors import ClseaveError
from clseave_cli.progress import Progress

#: Beside metrics.jsonl.
TENSORBOARD_FOLDER = "tensorboard"

_PROJECT = "clseave"


class Tracker(Protocol):
    """Something that shows figures while a run is under way."""

    def log(self, record: dict[str, Any]) -> None:
        """Takes one object of `metrics.jsonl`."""


#: One service: takes the numbers of a step.
_Send = Callable[[int, dict[str, float]], None]


def require(name: str) -> None:
    """Finds out before the work whether a tracker can be used.

    Raises:
        ClseaveError: its package is not installed.
    """
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    # Without an origin it is a folder of that name where the command runs: wandb makes one.
    if spec is None or spec.origin is None:
        raise ClseaveError(
            f"--tracker {name}: the package {name} is not installed; pip install -e '.[{name}]'."
        )


@contextmanager
def tracker(
    config: TrainingConfig, *, title: str, folder: Path, first_step: int, progress: Progress
) -> Iterator[Tracker]:
    """The tracker of a run, closed with the block. What it fails in is noted, once, and left.

    Args:
        config: `config.tracker` says which; the numbers among the options are shown with the run.
        title: what the run is called, such as `align de`.
        folder: the run's folder, for a tracker that writes files.
        first_step: the step the run begins or continues at.
        progress: told when the tracker fails.
    """
    services: dict[str, Callable[[], AbstractContextManager[_Send]]] = {
        "tensorboard": lambda: _tensorboard(folder, first_step),
        "wandb": lambda: _wandb(title, _numbers(dataclasses.asdict(config))),
        "trackio": lambda: _trackio(title, _numbers(dataclasses.asdict(config))),
    }
    tracker = _Guarded(config.tracker, services.get(config.tracker), progress)
    try:
        yield tracker
    finally:
        tracker.close()


class _Guarded:
    """Passes figures on to a service until it fails."""

    def __init__(
        self,
        name: str,
        service: Callable[[], AbstractContextManager[_Send]] | None,
        progress: Progress,
    ) -> None:
        self._name, self._progress = name, progress
        self._open = ExitStack()
        self._failed = False
        self._send: _Send | None = None
        if service is not None:
            with self._guard():
                self._send = self._open.enter_context(service())

    def log(self, record: dict[str, Any]) -> None:
        if self._send is not None and not self._failed:
            with self._guard():
                self._send(record["step"], _numbers(record))

    def close(self) -> None:
        with self._guard():
            self._open.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            # Standard output belongs to the command's result; what services print there is chatter.
            with redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            # Whatever a service raises, the training is worth more than its picture.
            if not self._failed:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                self._progress.note(
                    f"--tracker {self._name}: failed ({reason}); the run goes on without it, "
                    "metrics.jsonl has everything."
                )
            self._failed = True


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, those of an object in it under `name/key`."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": number for key, number in _numbers(value).items()}
        elif isinstance(value, int | float) and name != "step":
            numbers[name] = value
    return numbers


@contextmanager
def _tensorboard(folder: Path, first_step: int) -> Iterator[_Send]:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote after the state it continues from is hidden.
    with SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step) as writer:

        def send(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield send


@contextmanager
def _wandb(title: str, options: dict[str, float]) -> Iterator[_Send]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or _PROJECT,
        name=title,
        config=options,
        # Of itself it would also send command line, host, git remote and terminal output.
        settings=wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
        ),
    )
    try:
        yield lambda step, numbers: run.log(numbers, step=step)
    finally:
        run.finish()


@contextmanager
def _trackio(title: str, options: dict[str, float]) -> Iterator[_Send]:
    import trackio

    run = trackio.init(project=_PROJECT, name=title, config=options)
    try:
        yield lambda step, numbers: run.log(numbers, step=step)
    finally:
        run.finish()
