"""The hub: whether it answers, and its data sets, written out once as an ordinary data folder."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from clseave_cli.core.data.images import in_rgb
from clseave_cli.core.data.rows import IMAGE_KEYS, LABEL_KEYS, json_line
from clseave_cli.core.files import atomic_folder
from clseave_cli.errors import DataError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

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
    return " ".join(str(error).split())[:200] or repr(error)[:200]


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
