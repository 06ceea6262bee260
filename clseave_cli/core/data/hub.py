"""The hub: whether it answers, its models, and its data sets as ordinary data folders."""

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

#: A repository, and a branch, tag or commit of it.
_REPOSITORY = re.compile(r"([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.A | re.I)
#: What model folders consist of, and all that is fetched or pushed. Pickles are not among it.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.onnx", "*.onnx.data", "README.md",
)  # fmt: skip

_PREFIX = "hf:"
_TIMEOUT_SECONDS = 10.0


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
        data: a data folder; `hf:ORG/NAME`, which is downloaded through `datasets`; or a file of
            another layout, or a pattern of files. All but the first become a folder once.
        progress: told about the rows written.
        root: where such folders go.

    Raises:
        DataError: the data set cannot be loaded, or is of no layout we know.
    """
    files: list[Path] = []
    if not data.startswith(_PREFIX):
        # A pattern may begin at the root, which Path.glob refuses.
        named = [data] if Path(data).exists() else sorted(glob.glob(data, recursive=True))  # noqa: PTH207
        files = [path for path in map(Path, named) if path.is_file()]
        if not files:
            return Path(data)
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", data.removeprefix(_PREFIX)).strip("-.")
    if files:  # another content is another folder
        name += f"-{json_digest([file_digest(path) for path in files])[:8]}"
    target = root / name
    if not target.is_dir():
        with atomic_folder(target) as aside:
            parts = layouts.file_parts(files) if files else _hub_parts(data.removeprefix(_PREFIX))
            layouts.write_folder(aside, parts, data, progress)
    return target


def _hub_parts(name: str) -> Iterator[layouts.Part]:
    """The splits of a data set of the hub."""
    import datasets
    from huggingface_hub import constants, snapshot_download

    if not (constants.HF_HUB_OFFLINE or hub_answers()):  # its client would try for a minute
        raise DataError(
            f"--data hf:{name}: {constants.ENDPOINT} does not answer; set HF_HUB_OFFLINE=1 to take "
            "what was fetched before."
        )
    try:
        try:
            loaded = datasets.load_dataset(name)
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
    parts = [(ours, ENGLISH, loaded[n]) for n, ours in layouts.SPLITS.items() if n in loaded]
    if loaded.keys() <= layouts.CODES:  # each is the test data of a language
        parts = [("test", lang, rows) for lang, rows in loaded.items()]
    if not parts:
        usual = ", ".join(layouts.SPLITS)
        raise DataError(f"--data hf:{name}: none of its splits is one of {usual}.")
    for split, lang, rows in parts:
        yield split, split, lang, _plain_rows(rows)


def _plain_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows with the names of labels instead of numbers, and photos as the bytes of their files."""
    import datasets

    photos = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key in LABEL_KEYS if key in rows.features]
    for key in photos:
        rows = rows.cast_column(key, datasets.Image(decode=False))
    for row in rows:
        for key in photos:
            if row[key] and not row[key]["bytes"]:  # one that lies in the client's cache
                stream = io.BytesIO()
                in_rgb(datasets.Image().decode_example(row[key])).save(stream, "PNG")
                row[key] = stream.getvalue()
        for key in labels:
            if isinstance(row[key], int):
                names = getattr(rows.features[key], "names", LABELS)
                row[key] = names[row[key]] if 0 <= row[key] < len(names) else "-"
        yield row
