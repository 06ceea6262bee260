"""The folder of a run: unfinished beside its target, published whole at the end.

While a stage trains, its record and saved states lie in `{out}.partial/training`. When it is done,
the model and the record appear as `{out}` in one rename and the partial folder goes. Of several
processes the first one writes. It holds a lock on `{out}.partial/lock`, so whatever lies in the
partial folder is its own, and what an earlier one left half-written there can go.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from clseave_cli.core.config import StageConfig, TrainingConfig
from clseave_cli.core.files import (
    asides,
    atomic_folder,
    fsync_folder,
    locked,
    read_json,
    write_json,
    writing,
)
from clseave_cli.core.training import tracking
from clseave_cli.core.training.checkpoint import STATE
from clseave_cli.core.training.distribution import processes
from clseave_cli.errors import ClseaveError, UsageError
from clseave_cli.progress import Progress
from clseave_cli.version import __version__

#: Options that may differ between a run and its continuation.
_FREE_OPTIONS = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")
#: What a file system says that knows no locks (Lustre without `flock`, NFS without its daemon).
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Run:
    """One stage's run, new or continued; a context manager.

    Inside its block it is the only run into `out`, and its folder is there.

    Args:
        stage: name of the stage.
        out: folder the model will appear in.
        config: every resolved option.
        inputs: fingerprints of what the run reads (data files, models it starts from).

    Attributes:
        folder: where the record and the states lie.

    Raises:
        UsageError: an unfinished run lies there and `--resume` was not given, or the options or
            inputs differ from those of the run to be resumed.
        ClseaveError: another process is training there, or the package of the tracker is not
            installed.
    """

    def __init__(
        self, stage: str, out: Path, config: TrainingConfig, inputs: dict[str, str]
    ) -> None:
        tracking.require(config.tracker)
        self.out = out
        self._partial = _partial(out)
        self.folder = self._partial / "training"
        self._resume = config.resume
        self._lock = ExitStack()
        self._record = {
            "stage": stage,
            "options": plain_options(config),
            "inputs": inputs,
            "versions": {
                "clseave": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def __enter__(self) -> Run:
        processes().once(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _open(self) -> None:
        with writing(self._partial), ExitStack() as lock:
            self._take(lock)
            if not self.folder.exists():
                with atomic_folder(self.folder) as aside:
                    write_json(aside / "run.json", self._record)
                fsync_folder(self.out.parent)
            elif self._resume:
                require_same(read_json(self.folder / "run.json"), self._record, self._partial)
                self._clear_up()
            else:
                raise UsageError(
                    f"{self._partial}: an unfinished run lies there; --resume continues it, "
                    "deleting that folder forgets it."
                )
            _forget_published(self.out)
            self._lock = lock.pop_all()

    def _take(self, lock: ExitStack) -> None:
        path = self._partial / "lock"
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            path.touch()
            lock.enter_context(locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
            path.stat()  # not the lock of a folder that another run has just published
        except (BlockingIOError, FileNotFoundError):
            raise ClseaveError(
                f"{self._partial}: another process is training there; let it end or stop it, or "
                "choose another --out."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def _clear_up(self) -> None:
        """Removes what kills left of files and folders being written: they may be large."""
        left = asides(self._partial, re.escape(self.out.name))
        left += asides(self.folder, rf"{STATE.pattern}|summary\.json")
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def publish(self, save: Callable[[Path], Any], card: str) -> None:
        """Makes the finished model appear.

        Args:
            save: writes the model's files into the folder it is given.
            card: text of the model card.

        Raises:
            ClseaveError: the disk is full; the partial folder is kept.
        """
        processes().once(lambda: self._publish(save, card))

    def _publish(self, save: Callable[[Path], Any], card: str) -> None:
        with atomic_folder(self.out, aside_in=self._partial) as aside:
            save(aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
            (aside / "training").mkdir()
            for name in ("run.json", "metrics.jsonl", "summary.json"):
                shutil.copyfile(self.folder / name, aside / "training" / name)
            if (events := self.folder / tracking.TENSORBOARD_FOLDER).is_dir():
                shutil.copytree(events, aside / "training" / events.name)
        # In one move, so that a kill leaves no half of it behind to be resumed.
        doomed = Path(tempfile.mkdtemp(prefix=f".{self._partial.name}.", dir=self.out.parent))
        self._partial.rename(doomed / self._partial.name)
        # Another process may be at it too.
        shutil.rmtree(doomed, ignore_errors=True)


def is_complete(out: Path) -> bool:
    """Whether a run published this folder and no newer one is under way."""
    under_way = (_partial(out) / "training").exists()
    return (out / "training" / "summary.json").is_file() and not under_way


def finished_before(out: Path, progress: Progress) -> bool:
    """Whether there is nothing to resume, since the run `is_complete`; then says so."""
    if not is_complete(out):
        return False
    _forget_published(out)
    progress.note(f"{out}: already complete.")
    return True


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _forget_published(out: Path) -> None:
    """Removes partial folders that were moved away, and outlived a kill after the publication."""
    partial = _partial(out)
    for path in asides(out.parent, re.escape(partial.name)):
        with suppress(OSError):  # a file, so not ours; or gone
            if all(inner.name == partial.name for inner in path.iterdir()):
                shutil.rmtree(path)


def require_writable(out: Path) -> None:
    """Finds out before hours of training whether the result can be written.

    Raises:
        ClseaveError: `out` is a file, or its parent is one.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ClseaveError(f"{path}: is a file; expected a folder to write models into.")


def public_name(model: str) -> str:
    """How a model card calls a model: its hub id, or a folder's name without the local path."""
    path = Path(model)
    return path.resolve().name if path.is_dir() or len(path.parts) > 2 else model


def plain_options(config: StageConfig) -> dict[str, Any]:
    """Every resolved option, as JSON keeps it."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with what was made in another way.

    Args:
        old: `options` and `inputs` of the record that lies there.
        new: those of this run.
        folder: where it lies.

    Raises:
        UsageError: they differ; names the first.
    """
    for group in ("options", "inputs"):
        for name, value in new[group].items():
            if name not in _FREE_OPTIONS and old[group].get(name) != value:
                raise UsageError(
                    f"{folder}: was run with {name} = {old[group].get(name)!r}, not {value!r}; "
                    "resume with the same options and data, or delete that folder."
                )
