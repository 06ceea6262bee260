"""The folder of a run: unfinished beside its target, published whole at the end.

While a stage trains, its record and saved states lie in `{out}.partial/training`. When it is done,
the model and the record appear as `{out}` in one step and the partial folder goes. Of several
processes the first one writes. It holds the lock of `{out}`, so whatever is half-written there or
in the partial folder was left by a process that was killed.
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

from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.hypothesis_only import HYPOTHESIS_ONLY_FILE
from clseave_cli.core.data.seen import SEEN_FILE, SeenRows
from clseave_cli.core.files import (
    Kind,
    aside,
    atomic_folder,
    fsync_folder,
    locked_target,
    read_json,
    require_replaceable,
    sweep,
    write_json,
    writing,
)
from clseave_cli.core.training import tracking
from clseave_cli.core.training.checkpoint import STATE
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import TrainingResult
from clseave_cli.core.training.precision import Autocast, autocast, resolve_device
from clseave_cli.errors import UsageError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import Progress
from clseave_cli.version import __version__

#: Options that may differ between a run and its continuation.
_FREE_OPTIONS = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")
_RECORDS = ("run.json", "metrics.jsonl", "summary.json")
_TRAINING = (
    rf"training/(run\.json|metrics\.jsonl|summary\.json|{tracking.TENSORBOARD_FOLDER}/.+)"
    rf"|{re.escape(SEEN_FILE)}|{re.escape(HYPOTHESIS_ONLY_FILE)}"
)
#: What transformers writes into the folder of a whole model, which `pretrain` makes.
_HUGGING_FACE = (
    r"(\w*config|tokenizer|vocab|added_tokens|special_tokens_map|model\.safetensors\.index)\.json"
    r"|(vocab|merges)\.txt|[\w.]+\.model|chat_template\.jinja|model[\w-]*\.safetensors"
)
UNFINISHED = Kind(
    "an unfinished run",
    rf"lock|(.*/)?\.[^/]+\.clseave-[0-9a-f]{{8}}(/.*)?|training/{STATE.pattern}/.+|{_TRAINING}",
)


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
            # As JSON keeps them, to be compared with those of a run to be resumed.
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
        # Sums depend on how many threads share them: a resumed run goes on with as many.
        self._lock.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _open(self) -> int:
        """Makes or takes over the folder; returns the number of threads to train with."""
        with writing(self._partial), ExitStack() as lock:
            lock.enter_context(locked_target(self.out))
            self._require_replaceable()
            sweep(self.out.parent, re.escape(self._partial.name))
            if not self.folder.exists():
                with atomic_folder(self.folder) as folder:
                    write_json(folder / "run.json", self._record)
                fsync_folder(self.out.parent)
            elif not self._config.resume:
                raise UsageError(
                    f"{self._partial}: an unfinished run lies there; --resume continues it, "
                    "deleting that folder forgets it."
                )
            record = read_json(self.folder / "run.json")
            self._require_same(record)
            sweep(self._partial)
            sweep(self.folder)
            self._lock = lock.pop_all()
        return int(record.get("threads", torch.get_num_threads()))

    def _require_same(self, record: dict[str, Any]) -> None:
        """Refuses to resume a run that was started with other options or inputs.

        Raises:
            UsageError: names the first that differs.
        """
        for group in ("options", "inputs"):
            for name, value in self._record[group].items():
                old = record[group].get(name)
                if name not in _FREE_OPTIONS and not _same(old, value):
                    raise UsageError(
                        f"{self._partial}: was run with {name} = {old!r}, not {value!r}; "
                        "resume with the same options and data, or delete that folder."
                    )

    def _require_replaceable(self) -> None:
        require_replaceable(self.out, model_kind(self._stage), self._config)
        require_replaceable(self._partial, UNFINISHED)

    def publish(
        self, save: Callable[[Path], Any], card: str, seen: Sequence[SeenRows] = ()
    ) -> None:
        """Makes the finished model appear.

        Args:
            save: writes the model's files into the folder it is given.
            card: text of the model card.
            seen: the rows it was trained on, and those that chose its checkpoint.

        Raises:
            ClseaveError: the disk is full, or a file is in the way; the partial folder is kept.
        """

        def write() -> None:
            with atomic_folder(self.out) as folder:
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
            # In one step, so that a kill leaves no half of it behind to be resumed.
            doomed = self._partial.rename(aside(self._partial))
            shutil.rmtree(doomed, ignore_errors=True)

        processes().once(write)


def is_complete(out: Path) -> bool:
    """Whether a run published this folder and no newer one is under way."""
    complete = (out / "training" / "summary.json").is_file()
    return complete and not (_partial(out) / "training").exists()


def finished_before(out: Path, progress: Progress) -> bool:
    """Whether there is nothing to resume, since the run `is_complete`; then says so."""
    if not is_complete(out):
        return False
    if is_first_process():
        with locked_target(out):
            sweep(out.parent, re.escape(_partial(out).name))
    progress.note(f"{out}: already complete.")
    return True


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def model_kind(stage: str) -> Kind:
    """The kind of folder that a stage's runs become."""
    members = rf"config\.json|calibration\.json|README\.md|{_TRAINING}"
    return Kind(
        f"a model of `{stage}`",
        f"{members}|{_HUGGING_FACE}" if stage == "pretrain" else members,
        "training/run.json",
        lambda record: record.get("stage") == stage,
    )


def public_name(model: str) -> str:
    """How a model card calls a model: its hub id, or a folder's name without the local path."""
    path = Path(model)
    is_local = path.is_absolute() or path.is_dir() or len(path.parts) > 2
    return path.resolve().name if is_local else model


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, str) and isinstance(new, str):
        # `data` and `./data/` are one folder; other words are one only if they are equal.
        return old == new or Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    Attributes:
        folder: the model.
        languages: what it reads, or was trained on; empty if that is no matter of language.
        training: how the run went; None if it had been finished before.
    """

    folder: Path
    languages: tuple[str, ...]
    training: TrainingResult | None


@dataclass(frozen=True)
class Setup:
    """What every stage settles before it reads its data.

    Attributes:
        device: the device to compute on.
        autocast: the arithmetic.
        data: the data folder; a data set of the hub has become one.
    """

    device: torch.device
    autocast: Autocast
    data: Path


def set_up(
    stage: str, config: TrainingConfig, data: str | Path, out: Path, progress: Progress
) -> Setup | None:
    """Looks at target, device and data; None where `--resume` meets a finished run.

    Raises:
        ClseaveError: one of them cannot be used.
    """
    require_replaceable(out, model_kind(stage), config)
    if config.resume and finished_before(out, progress):
        return None
    device = resolve_device(config.device)
    folder = processes().once(lambda: data_folder(str(data), progress))
    return Setup(device, autocast(config.precision, device), folder)
