"""The folder of a run: unfinished beside its target, published whole at the end.

While a stage trains, its record and saved states lie in `{out}.partial/training`. When it is done,
the model and the record appear as `{out}` in one rename and the partial folder goes. Of several
processes the first one writes.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from clseave_cli import __version__
from clseave_cli.core.config import StageConfig, TrainingConfig
from clseave_cli.core.files import atomic_folder, read_json, write_json
from clseave_cli.core.training import tracking
from clseave_cli.core.training.distribution import processes
from clseave_cli.errors import ClseaveError, UsageError

#: Options that may differ between a run and its continuation.
_FREE_OPTIONS = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")


class Run:
    """One stage's run, new or continued.

    Args:
        stage: name of the stage.
        out: folder the model will appear in.
        config: every resolved option.
        inputs: fingerprints of what the run reads (data files, models it starts from).

    Raises:
        UsageError: an unfinished run lies there and `--resume` was not given, or the options or
            inputs differ from those of the run to be resumed.
        ClseaveError: the package of the tracker is not installed.
    """

    def __init__(
        self, stage: str, out: Path, config: TrainingConfig, inputs: dict[str, str]
    ) -> None:
        tracking.require(config.tracker)
        self.out = out
        self._partial = out.with_name(out.name + ".partial")
        self.folder = self._partial / "training"
        record = {
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
        processes().once(lambda: self._open(record, config.resume))

    def _open(self, record: dict[str, Any], resume: bool) -> None:
        if self.folder.exists():
            if not resume:
                raise UsageError(
                    f"{self._partial}: an unfinished run lies there; --resume continues it, "
                    "deleting that folder forgets it."
                )
            require_same(read_json(self.folder / "run.json"), record, self._partial)
        else:
            with atomic_folder(self._partial) as aside:
                (aside / "training").mkdir()
                write_json(aside / "training" / "run.json", record)

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
        with atomic_folder(self.out) as aside:
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
        shutil.rmtree(doomed)


def is_complete(out: Path) -> bool:
    """Whether a run published this folder and no newer one is under way."""
    partial = out.with_name(out.name + ".partial")
    return (out / "training" / "summary.json").is_file() and not partial.exists()


def require_writable(out: Path) -> None:
    """Finds out before hours of training whether the result can be written.

    Raises:
        ClseaveError: `out` is a file, or its parent is one.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ClseaveError(f"{path}: is a file; expected a folder to write models into.")


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
