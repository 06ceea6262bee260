"""The hub: whether it answers, its models, and its data sets as ordinary data folders."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import Any, TypeVar

from clseave_cli.core.config import StageConfig, TrainingConfig
from clseave_cli.core.data.images import in_rgb
from clseave_cli.core.data.rows import IMAGE_KEYS, LABEL_KEYS, json_line
from clseave_cli.core.files import atomic_folder
from clseave_cli.errors import DataError, ModelError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

Config = TypeVar("Config", bound=StageConfig)

#: A repository, and a branch, tag or commit of it.
_REPOSITORY = re.compile(r"([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.A | re.I)
#: What model folders consist of, and all that is fetched or pushed. Pickles are not among it.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.onnx", "*.onnx.data", "README.md",
)  # fmt: skip

_PREFIX = "hf:"
_TIMEOUT_SECONDS = 10.0
#: Names under which the hub knows our splits.
_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached; without it its client would try again for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_SECONDS
        )
    except Exception:
        # Whatever goes wrong, down to HF_HUB_OFFLINE: what is in the cache must do.
        return False
    return True


def hub_reason(error: Exception) -> str:
    """Why something could not be had from the hub, short enough for a one-line message."""
    import huggingface_hub

    if not hub_answers():
        hub = huggingface_hub.constants.ENDPOINT
        return f"{hub} does not answer, or HF_HUB_OFFLINE is set"
    if isinstance(error, huggingface_hub.errors.RevisionNotFoundError):
        return "no such branch, tag or commit"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return "no such repository, or not open to you: `hf auth login`, or set HF_TOKEN"
    return " ".join(str(error).split())[:200] or repr(error)[:200]


def is_repository(name: str) -> bool:
    """Whether a text is spelled like a repository of the hub, `ORG/NAME`, without a revision."""
    match = _REPOSITORY.fullmatch(name)
    return match is not None and match[2] is None


def model_folder(name: Path, progress: Progress = SILENT) -> Path:
    """The local folder that `--runs`, `--teacher`, `--student` and `--students` mean.

    Args:
        name: a folder, or `ORG/NAME[@revision]` where no such folder is here. It is fetched into
            the hub's cache; without a connection, what was fetched before is used.
        progress: told what is fetched.

    Raises:
        ModelError: there is no such repository, or it cannot be fetched.
    """
    match = _REPOSITORY.fullmatch(str(name))
    if match is None or name.exists():
        return name
    import huggingface_hub

    if hub_answers():
        progress.note(f"{name}: fetching what is not in the cache yet")
    try:
        folder = huggingface_hub.snapshot_download(
            match[1],
            revision=match[2],
            allow_patterns=list(MODEL_FILES),
            local_files_only=not hub_answers(),
            library_name="clseave",
        )
    except Exception as error:  # of the hub's client, of HTTP, or of the disk
        raise ModelError(
            f"{name}: no such folder here, and not fetched from the hub ({hub_reason(error)})."
        ) from None
    return Path(folder)


def with_local_models(config: Config, progress: Progress = SILENT) -> Config:
    """The options with folders where they name repositories of the hub.

    Where models are trained, `--runs` is what they are written to and `--student` what they start
    from; both stay as they are.

    Raises:
        ModelError: as `model_folder`.
    """
    local: dict[str, Any] = {}
    for name in ("runs", "teacher", "student", "students"):
        value = getattr(config, name, None)
        trains = isinstance(config, TrainingConfig)
        if value is None or (trains and name in ("runs", "student")):
            continue
        if isinstance(value, tuple):
            local[name] = tuple(model_folder(each, progress) for each in value)
        else:
            local[name] = model_folder(value, progress)
        if name == "teacher" and local[name] != value and (local[name] / "clip-ve").is_dir():
            local[name] /= "clip-ve"  # a repository is laid out like --runs
    return dataclasses.replace(config, **local) if local else config


def data_folder(data: str, progress: Progress = SILENT, root: Path = Path("data")) -> Path:
    """The local folder that `--data` means.

    Args:
        data: a folder, or `hf:ORG/NAME`, which is downloaded through `datasets` and written to
            `{root}/ORG--NAME` the first time.
        progress: told about the rows written.
        root: where such folders go.

    Raises:
        DataError: the data set cannot be loaded or has no split we know.
    """
    if not data.startswith(_PREFIX):
        return Path(data)
    name = data.removeprefix(_PREFIX)
    target = root / re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.")
    if not target.is_dir():
        with atomic_folder(target) as aside:
            _write(name, aside, progress)
    return target


def _write(name: str, folder: Path, progress: Progress) -> None:
    import datasets
    from huggingface_hub import constants

    if not (constants.HF_HUB_OFFLINE or hub_answers()):  # its client would try for a minute
        raise DataError(
            f"--data hf:{name}: {constants.ENDPOINT} does not answer; set HF_HUB_OFFLINE=1 to take "
            "what was fetched before."
        )
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"--data hf:{name}: cannot be loaded ({reason}).") from None
    splits = {_SPLITS[split]: rows for split, rows in loaded.items() if split in _SPLITS}
    if not splits:
        raise DataError(f"--data hf:{name}: none of its splits is one of {', '.join(_SPLITS)}.")
    (folder / "images").mkdir()
    for split, rows in splits.items():
        with (
            (folder / f"snli_ve_{split}.jsonl").open("wb") as stream,
            progress.task(f"{name}: {split}", total=len(rows), unit="rows") as task,
        ):
            for number, row in enumerate(rows):
                plain = _plain_row(row, f"{split}-{number}", rows.features, folder / "images")
                stream.write(json_line(plain))
                task.advance()


def _plain_row(row: dict[str, Any], row_id: str, features: Any, images: Path) -> dict[str, Any]:
    """A row as JSON: label names instead of ids, images as files."""
    plain = {"pairID": row_id, **row}
    for key in LABEL_KEYS:
        value = plain.get(key)
        if isinstance(value, int):
            names = getattr(features[key], "names", LABELS)
            plain[key] = names[value] if 0 <= value < len(names) else "-"
    for key in IMAGE_KEYS:
        if hasattr(plain.get(key), "convert"):
            # Named by content: a photo of many rows stays one photo, whose rows belong together,
            # and the data set's own file name is not trusted as a path.
            image = in_rgb(plain[key])
            digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
            digest.update(image.tobytes())
            plain[key] = f"{digest.hexdigest()}.png"
            if not (images / plain[key]).exists():
                image.save(images / plain[key])
    return plain
