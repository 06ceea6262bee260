"""`predictions.{lang}.jsonl`: what was predicted for every row, so that results can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clseave_cli.core.files import atomic_file
from clseave_cli.errors import DataError
from clseave_cli.labels import LABEL_IDS, LABELS

_PREFIX, _SUFFIX = "predictions.", ".jsonl"


@dataclass(frozen=True, eq=False)
class PredictedRows:
    """One language's predictions, as columns of equal length N.

    Attributes:
        lang: language code, and the mode where that is not zero-shot: `de`, `de.translate-test`.
        pair_ids: unique row ids.
        images: image of each row, as the data name it.
        labels: (N,) int64 gold label ids.
        probabilities: (N, 3) float64, in the order of `LABELS`.
    """

    lang: str
    pair_ids: Sequence[str]
    images: Sequence[str]
    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) predicted label ids."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    def write(self, folder: Path) -> Path:
        """Writes the rows into a report folder, atomically, and returns the file's path."""
        path = folder / f"{_PREFIX}{self.lang}{_SUFFIX}"
        columns = zip(
            self.pair_ids,
            self.images,
            self.labels.tolist(),
            self.predicted.tolist(),
            self.probabilities.tolist(),
            strict=True,
        )
        with atomic_file(path) as stream:
            for pair_id, image, label, predicted, probabilities in columns:
                row = {
                    "pairID": pair_id,
                    "image": image,
                    "label": LABELS[label],
                    "predicted": LABELS[predicted],
                    "probabilities": probabilities,
                }
                stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        return path


def predicted_languages(folder: Path) -> list[str]:
    """What predictions lie in a report folder (`PredictedRows.lang`), sorted, English first.

    Raises:
        DataError: there is no such folder, or it holds no predictions.
    """
    languages = sorted(
        path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        for path in folder.glob(f"{_PREFIX}*{_SUFFIX}")
    )
    if not languages:
        raise DataError(
            f"{folder}: no predictions.*.jsonl in it; write them with: "
            f"clseave evaluate --report {folder}"
        )
    return sorted(languages, key=lambda lang: lang != "en")


def read_predicted_rows(folder: Path, lang: str) -> PredictedRows:
    """Reads one language's predictions.

    Raises:
        DataError: the file is missing; or a line is damaged, or repeats a row: names it.
    """
    path = folder / f"{_PREFIX}{lang}{_SUFFIX}"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    pair_ids: dict[str, int] = {}
    images, labels, probabilities = [], [], []
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            pair_id, label = str(row["pairID"]), LABEL_IDS[row["label"]]
            triple = [float(p) for p in row["probabilities"]]
            if len(triple) != len(LABELS) or not np.isfinite(triple).all():
                raise ValueError
            if LABEL_IDS[row["predicted"]] != int(np.argmax(triple)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DataError.at(
                path,
                number,
                "expected pairID, image, label, predicted and three probabilities; evaluate again.",
            ) from None
        if pair_id in pair_ids:
            raise DataError.at(path, number, f"pairID {pair_id!r} is there twice.")
        pair_ids[pair_id] = number
        images.append(str(row.get("image", "")))
        labels.append(label)
        probabilities.append(triple)
    return PredictedRows(
        lang=lang,
        pair_ids=list(pair_ids),
        images=images,
        labels=np.array(labels, dtype=np.int64),
        probabilities=np.array(probabilities, dtype=np.float64).reshape(-1, len(LABELS)),
    )
