"""The folder of a run: partial beside its target during training, published whole at the end.

While a stage trains, its record and saved states are in `{out}.partial/training`. At the end, model
and record appear as `{out}` in one step, and the partial folder is removed. Rank 0 does the
writing. It holds the lock of `{out}`, so any half-written file was left by a killed process.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from clseave_cli.core import files
from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.hypothesis_only import HYPOTHESIS_ONLY_FILE
from clseave_cli.core.data.seen import SEEN_FILE, SeenRows
from clseave_cli.core.training import tracking
from clseave_cli.core.training.checkpoint import STATE
from clseave_cli.core.training.device import Autocast, autocast, resolve_device
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import TrainingResult
from clseave_cli.errors import UsageError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import Progress
from clseave_cli.version import __version__

#: Options that may differ when a run is resumed.
_FREE_OPTIONS = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")
_RECORDS = ("run.json", "metrics.jsonl", "summary.json")
_TRAINING = (
    rf"training/(run\.json|metrics\.jsonl|summary\.json|{tracking.TENSORBOARD_FOLDER}/.+)"
    rf"|{re.escape(SEEN_FILE)}|{re.escape(HYPOTHESIS_ONLY_FILE)}"
)
#: The files of a Hugging Face model, which `pretrain` publishes.
_HUGGING_FACE = (
    r"(\w*config|tokenizer|vocab|added_tokens|special_tokens_map|model\.safetensors\.index)\.json"
    r"|(vocab|merges)\.txt|[\w.]+\.model|chat_template\.jinja|model[\w-]*\.safetensors"
)
UNFINISHED = files.Kind(
    "an unfinished run",
    rf"lock|(.*/)?\.[^/]+\.clseave-[0-9a-f]{{8}}(/.*)?|training/{STATE.pattern}/.+|{_TRAINING}",
)


class Run:
    """A stage's run, new or resumed; a context manager that locks `out`.

    Args:
        stage: name of the stage.
        out: folder of the finished model.
        config: every resolved option.
        inputs: fingerprints of the data files and models that the run reads.

    Attributes:
        folder: of the record and the states; exists within the block.

    Raises:
        UsageError: there is an unfinished run, without `--resume` or with other options or inputs.
        ClseaveError: another process is training there, or the tracker's package is missing.
    """

    def __init__(
        self, stage: str, out: Path, config: TrainingConfig, inputs: dict[str, str]
    ) -> None:
        tracking.require(config.tracker)
        self.out = out
        self._partial = _partial(out)
        self.folder = self._partial / "training"
        self._stage, self._config = stage, config
        self._lock = ExitStack()
        self._record: dict[str, Any] = {
            "stage": stage,
            # In JSON's types, to be compared with those of a run to resume.
            "options": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
            "inputs": inputs,
            "versions": {
                "clseave": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
        }

    def __enter__(self) -> Run:
        threads = processes().once(self._open)
        # Sums depend on the number of threads, so a resumed run keeps it.
        self._lock.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _open(self) -> int:
        """Creates or takes over the folder; returns the number of threads to train with."""
        with files.writing(self._partial), ExitStack() as lock:
            lock.enter_context(files.locked_target(self.out))
            self._require_replaceable()
            files.sweep(self.out.parent, re.escape(self._partial.name))
            if not self.folder.exists():
                with files.atomic_folder(self.folder) as folder:
                    files.write_json(folder / "run.json", self._record)
                files.fsync_folder(self.out.parent)
            elif not self._config.resume:
                raise UsageError(
                    f"{self._partial}: there is an unfinished run; --resume continues it, "
                    "deleting that folder discards it."
                )
            record = files.read_json(self.folder / "run.json")
            self._require_same(record)
            files.sweep(self._partial)
            files.sweep(self.folder)
            self._lock = lock.pop_all()
        return int(record.get("threads", torch.get_num_threads()))

    def _require_same(self, record: dict[str, Any]) -> None:
        """Raises a UsageError if the run was started with other options or inputs."""
        for group in ("options", "inputs"):
            for name, value in self._record[group].items():
                old = record[group].get(name)
                if name not in _FREE_OPTIONS and not _same(old, value):
                    raise UsageError(
                        f"{self._partial}: was run with {name} = {old!r}, not {value!r}; "
                        "resume with the same options and data, or delete that folder."
                    )

    def _require_replaceable(self) -> None:
        files.require_replaceable(self.out, model_kind(self._stage), self._config)
        files.require_replaceable(self._partial, UNFINISHED)

    def publish(
        self, save: Callable[[Path], Any], card: str, seen: Sequence[SeenRows] = ()
    ) -> None:
        """Publishes the finished model, its files written by `save`, and the text of its card.

        `seen` are the rows that trained it, and those that selected its checkpoint.

        Raises:
            ClseaveError: the disk is full, or a file is in the way; the partial folder is kept.
        """

        def write() -> None:
            with files.atomic_folder(self.out) as folder:
                save(folder)
                (folder / "README.md").write_text(card, encoding="utf-8")
                (folder / "training").mkdir(exist_ok=True)
                for name in _RECORDS:
                    shutil.copyfile(self.folder / name, folder / "training" / name)
                if (events := self.folder / tracking.TENSORBOARD_FOLDER).is_dir():
                    shutil.copytree(events, folder / "training" / events.name)
                if seen:
                    SeenRows.union(seen).write(folder)
                self._require_replaceable()
            # In one step, so that a kill leaves no partial run to resume.
            obsolete = self._partial.rename(files.aside(self._partial))
            shutil.rmtree(obsolete, ignore_errors=True)

        processes().once(write)


def is_complete(out: Path) -> bool:
    """Whether a run published this folder, and there is no newer unfinished one."""
    is_published = (out / "training" / "summary.json").is_file()
    return is_published and not (_partial(out) / "training").exists()


def finished_before(out: Path, progress: Progress) -> bool:
    """Whether the run `is_complete`, with a note; removes what a kill may have left."""
    if not is_complete(out):
        return False
    if is_first_process():
        with files.locked_target(out):
            files.sweep(out.parent, re.escape(_partial(out).name))
    progress.note(f"{out}: already complete.")
    return True


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def model_kind(stage: str) -> files.Kind:
    """The kind of folder that a stage publishes."""
    members = rf"config\.json|calibration\.json|README\.md|{_TRAINING}"
    return files.Kind(
        f"a model of `{stage}`",
        f"{members}|{_HUGGING_FACE}" if stage == "pretrain" else members,
        "training/run.json",
        lambda record: record.get("stage") == stage,
    )


def public_name(model: str) -> str:
    """The model's name in a model card: its hub id, or its folder's name without the path."""
    path = Path(model)
    is_local = path.is_absolute() or path.is_dir() or len(path.parts) > 2
    return path.resolve().name if is_local else model


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, str) and isinstance(new, str):  # `data` and `./data/` are the same folder
        return old == new or Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


@dataclass(frozen=True)
class StageResult:
    """The model that a stage trained."""

    folder: Path
    languages: tuple[str, ...]  # that it reads, or was trained on; empty if that does not apply
    training: TrainingResult | None  # None: it was already complete


@dataclass(frozen=True)
class Setup:
    """The environment of a stage."""

    device: torch.device
    autocast: Autocast
    data: Path  # local, even for a data set of the hub


def set_up(
    stage: str, config: TrainingConfig, data: str | Path, out: Path, progress: Progress
) -> Setup | None:
    """Resolves device and data, and checks the target; None if `--resume` finds a finished run.

    Raises:
        ClseaveError: one of them cannot be used.
    """
    files.require_replaceable(out, model_kind(stage), config)
    if config.resume and finished_before(out, progress):
        return None
    device = resolve_device(config.device)
    folder = processes().once(lambda: data_folder(str(data), progress))
    return Setup(device, autocast(config.precision, device), folder)
