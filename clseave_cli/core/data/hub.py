"""The Hugging Face hub: its models and data sets as local folders."""

from __future__ import annotations

import dataclasses
import functools
import glob
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from clseave_cli.core.config import StageConfig, TrainingConfig
from clseave_cli.core.data import layouts
from clseave_cli.core.data.images import in_rgb
from clseave_cli.core.data.records import ENGLISH
from clseave_cli.core.data.rows import LABEL_KEYS
from clseave_cli.core.files import atomic_folder, file_digest, json_digest
from clseave_cli.errors import DataError, ModelError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

Config = TypeVar("Config", bound=StageConfig)

#: A repository and, optionally, a branch, tag or commit.
_REPOSITORY = re.compile(r"([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.A | re.I)
#: The only files of models that are fetched or pushed; pickles are excluded.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.onnx", "*.onnx.data", "README.md",
)  # fmt: skip

_PREFIX = "hf:"
_TIMEOUT_SECONDS = 10.0


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached; if not, its client would retry for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_SECONDS
        )
    except Exception:  # including HF_HUB_OFFLINE: use what is cached
        return False
    return True


def hub_reason(error: Exception) -> str:
    """Why something could not be fetched from the hub, for a one-line message."""
    import huggingface_hub

    if not hub_answers():
        hub = huggingface_hub.constants.ENDPOINT
        return f"{hub} does not answer, or HF_HUB_OFFLINE is set"
    if isinstance(error, huggingface_hub.errors.RevisionNotFoundError):
        return "no such branch, tag or commit"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return "no such repository, or no access: run `hf auth login`, or set HF_TOKEN"
    return " ".join(str(error).split())[:200] or repr(error)[:200]


def is_repository(name: str) -> bool:
    """Whether a name has the form `ORG/NAME`, without a revision."""
    match = _REPOSITORY.fullmatch(name)
    return match is not None and match[2] is None


def model_folder(name: Path, progress: Progress = SILENT) -> Path:
    """The local folder for a value of `--runs`, `--teacher`, `--student` or `--students`.

    If it is not a folder but `ORG/NAME[@revision]`, it is fetched into the hub's cache. Without a
    connection, the cached copy is used.

    Raises:
        ModelError: there is no such repository, or it cannot be fetched.
    """
    match = _REPOSITORY.fullmatch(str(name))
    if match is None or name.exists():
        return name
    import huggingface_hub

    if hub_answers():
        progress.note(f"{name}: fetching files that are not cached")
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
            f"{name}: no such folder, and cannot be fetched from the hub ({hub_reason(error)})."
        ) from None
    return Path(folder)


def with_local_models(config: Config, progress: Progress = SILENT) -> Config:
    """A copy of options in which local folders replace hub ids.

    In training, `--runs` is the output and `--student` the base model; both are left unchanged.

    Raises:
        ModelError: as `model_folder`.
    """
    trains = isinstance(config, TrainingConfig)
    local: dict[str, Any] = {}
    for name in ("teacher", "students") if trains else ("teacher", "students", "runs", "student"):
        value = getattr(config, name, None)
        if isinstance(value, tuple):
            local[name] = tuple(model_folder(each, progress) for each in value)
        elif value is not None:
            local[name] = model_folder(value, progress)
        if name == "teacher" and local.get(name) != value and (local[name] / "clip-ve").is_dir():
            local[name] /= "clip-ve"  # a repository is laid out like --runs
    return dataclasses.replace(config, **local) if local else config


def data_folder(data: str, progress: Progress = SILENT, root: Path = Path("data")) -> Path:
    """The local folder for a value of `--data`.

    This is a data folder; `hf:ORG/NAME`, downloaded through `datasets`; or a file of a published
    layout or a pattern of such files. All but the first are converted, once, to a folder in `root`.

    Raises:
        DataError: the data set cannot be loaded, or its layout is not supported.
    """
    files: list[Path] = []
    if not data.startswith(_PREFIX):
        # A pattern may begin at the root, which Path.glob refuses.
        paths = [data] if Path(data).exists() else sorted(glob.glob(data, recursive=True))  # noqa: PTH207
        files = [path for path in map(Path, paths) if path.is_file()]
        if not files:
            return Path(data)
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", data.removeprefix(_PREFIX)).strip("-.")
    if files:  # files with other contents get another folder
        name += f"-{json_digest([file_digest(path) for path in files])[:8]}"
    target = root / name
    if not target.is_dir():
        with atomic_folder(target) as folder:
            parts = layouts.file_parts(files) if files else _hub_parts(data.removeprefix(_PREFIX))
            layouts.write_folder(folder, parts, data, progress)
    return target


def _hub_parts(name: str) -> Iterator[layouts.Part]:
    import datasets
    from huggingface_hub import constants, snapshot_download

    if not (constants.HF_HUB_OFFLINE or hub_answers()):  # the client would retry for a minute
        raise DataError(
            f"--data hf:{name}: {constants.ENDPOINT} does not answer; set HF_HUB_OFFLINE=1 to use "
            "cached data."
        )
    try:
        try:
            splits = datasets.load_dataset(name)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Such a script only reads the files beside it.
            endings = ["*.jsonl", "*.csv", "*.parquet"]
            folder = snapshot_download(name, repo_type="dataset", allow_patterns=endings)
            files = [path for ending in endings for path in Path(folder).rglob(ending)]
            yield from layouts.file_parts(sorted(files))
            return
    except DataError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"--data hf:{name}: cannot be loaded ({reason}).") from None
    parts = [(ours, ENGLISH, splits[n]) for n, ours in layouts.SPLITS.items() if n in splits]
    if splits.keys() <= layouts.CODES:  # each is the test data of a language
        parts = [("test", lang, rows) for lang, rows in splits.items()]
    if not parts:
        usual = ", ".join(layouts.SPLITS)
        raise DataError(f"--data hf:{name}: none of its splits is one of {usual}.")
    for split, lang, rows in parts:
        yield split, split, lang, _plain_rows(rows)


def _plain_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows with labels by name instead of number, and photos as the bytes of their files."""
    import datasets

    photos = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key in LABEL_KEYS if key in rows.features]
    for key in photos:
        rows = rows.cast_column(key, datasets.Image(decode=False))
    for row in rows:
        for key in photos:
            if row[key] and not row[key]["bytes"]:  # a path in the client's cache
                stream = io.BytesIO()
                in_rgb(datasets.Image().decode_example(row[key])).save(stream, "PNG")
                row[key] = stream.getvalue()
        for key in labels:
            if isinstance(row[key], int):
                names = getattr(rows.features[key], "names", LABELS)
                row[key] = names[row[key]] if 0 <= row[key] < len(names) else "-"
        yield row
