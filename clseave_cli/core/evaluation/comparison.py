"""Predictions row by row, and `compare`, which compares two evaluations by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clseave_cli.core.data.rows import json_line, read_rows
from clseave_cli.core.evaluation.metrics import Difference, compare_predictions
from clseave_cli.core.evaluation.results import RESULTS_FILE, Results, Signature
from clseave_cli.core.files import atomic_file
from clseave_cli.errors import DataError
from clseave_cli.labels import LABEL_IDS, LABELS

_PREFIX, _SUFFIX = "predictions.", ".jsonl"


@dataclass(frozen=True, eq=False)
class PredictedRows:
    """One language's predictions, as columns of equal length N."""

    lang: str  # `LanguageResult.key`: `de`, `de.translate-test`
    pair_ids: Sequence[str]  # unique row ids
    images: Sequence[str]  # image of each row, as named in the data
    labels: npt.NDArray[np.int64]  # (N,) int64 gold label ids
    probabilities: npt.NDArray[np.float64]  # (N, 3) float64, in the order of `LABELS`

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) predicted label ids."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    def write(self, folder: Path) -> Path:
        """Writes `predictions.LANG.jsonl` into a report folder, atomically; returns its path."""
        path = folder / f"{_PREFIX}{self.lang}{_SUFFIX}"
        columns = {
            "pairID": self.pair_ids,
            "image": self.images,
            "label": [LABELS[label] for label in self.labels],
            "predicted": [LABELS[label] for label in self.predicted],
            "probabilities": self.probabilities.tolist(),
        }
        with atomic_file(path) as stream:
            for row in zip(*columns.values(), strict=True):
                stream.write(json_line(dict(zip(columns, row, strict=True))))
        return path


def predicted_languages(folder: Path) -> list[str]:
    """The predictions in a report folder by `PredictedRows.lang`, sorted, English first.

    Raises:
        DataError: there is no such folder, or it holds no predictions.
    """
    paths = folder.glob(f"{_PREFIX}*{_SUFFIX}")
    languages = [path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for path in paths]
    if not languages:
        command = f"clseave evaluate --report {folder}"
        raise DataError(f"{folder}: no predictions.*.jsonl in it; write them with: {command}")
    return sorted(languages, key=lambda lang: (lang != "en", lang))


def read_predicted_rows(folder: Path, lang: str) -> PredictedRows:
    """Reads one language's predictions.

    Raises:
        DataError: the file is missing, or a line is damaged or repeats a row; names the line.
    """
    path = folder / f"{_PREFIX}{lang}{_SUFFIX}"
    rows: dict[str, tuple[str, int, list[float]]] = {}
    for number, row, _ in read_rows(path, ()):
        try:
            pair_id, label = str(row["pairID"]), LABEL_IDS[row["label"]]
            triple = [float(p) for p in row["probabilities"]]
            is_predicted = LABEL_IDS[row["predicted"]] == int(np.argmax(triple))
            if len(triple) != len(LABELS) or not np.isfinite(triple).all() or not is_predicted:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            expected = "pairID, image, label, predicted and three probabilities"
            raise DataError.at(path, number, f"expected {expected}; evaluate again.") from None
        if pair_id in rows:
            raise DataError.at(path, number, f"pairID {pair_id!r} is there twice.")
        rows[pair_id] = str(row.get("image", "")), label, triple
    images = [image for image, *_ in rows.values()]
    labels = np.array([label for _, label, _ in rows.values()], dtype=np.int64)
    p = np.array([triple for *_, triple in rows.values()], dtype=np.float64)
    return PredictedRows(lang, list(rows), images, labels, p.reshape(-1, len(LABELS)))


@dataclass(frozen=True)
class LanguageComparison:
    """Two evaluations in one language, on the rows that both have."""

    lang: str  # `PredictedRows.lang`
    num_examples: int
    num_images: int
    only_in_first: int  # rows left out because the second evaluation lacks them
    only_in_second: int
    accuracy_first: float  # fractions
    accuracy_second: float
    agreement: float  # share of rows given the same label
    difference: Difference  # paired, first minus second
    verdict: Literal["tie", "first", "second"]  # the better one


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, compared."""

    first: str  # report folders
    second: str
    languages: list[LanguageComparison]  # languages of both, English first
    missing_in_first: list[str]  # languages
    missing_in_second: list[str]
    resamples: int  # of the bootstrap, with its seed
    seed: int
    signature_first: Signature | None  # None: the folder has only predictions
    signature_second: Signature | None


def compare_reports(
    first: Path, second: Path, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compares two report folders (`evaluate --report`), joining rows by `pairID`.

    Intervals are not corrected for many comparisons: of twenty between equal models, expect one to
    look different.

    Raises:
        DataError: a folder has no predictions, they have no language or no row in common, or they
            disagree about a row's label or photo; or a `results.json` is of another format.
    """
    in_first, in_second = predicted_languages(first), predicted_languages(second)
    common = [lang for lang in in_first if lang in in_second]
    if not common:
        raise DataError(
            f"{first} has {', '.join(in_first)} and {second} has {', '.join(in_second)}: "
            "no language in common to compare."
        )
    sampling: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return Comparison(
        first=str(first),
        second=str(second),
        languages=[
            compare_rows(*(read_predicted_rows(f, lang) for f in (first, second)), **sampling)
            for lang in common
        ],
        missing_in_first=[lang for lang in in_second if lang not in in_first],
        missing_in_second=[lang for lang in in_first if lang not in in_second],
        **sampling,
        signature_first=_signature(first),
        signature_second=_signature(second),
    )


def _signature(folder: Path) -> Signature | None:
    return Results.read(folder).signature if (folder / RESULTS_FILE).is_file() else None


def rows_in_common(
    first: Sequence[str], second: Sequence[str]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The numbers of the rows whose ids both have, in the one and in the other."""
    row_of = {pair_id: row for row, pair_id in enumerate(second)}
    pairs = [(row, row_of[pair_id]) for row, pair_id in enumerate(first) if pair_id in row_of]
    rows, others = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    return rows, others


def compare_rows(
    first: PredictedRows, second: PredictedRows, *, resamples: int, seed: int
) -> LanguageComparison:
    """Compares two sets of predictions on the rows that both have.

    Raises:
        DataError: no row in common, or the two disagree about a row's label or photo.
    """
    rows, others = rows_in_common(first.pair_ids, second.pair_ids)
    if not len(rows):
        raise DataError(f"{first.lang}: no pairID in common; were they the same split?")
    labels, images = first.labels[rows], np.asarray(first.images)[rows]
    differs = (labels != second.labels[others]) | (images != np.asarray(second.images)[others])
    if differs.any():
        raise DataError(
            f"{first.lang}: row {first.pair_ids[rows[differs.argmax()]]!r} has another label or "
            "image in the second evaluation; only evaluations of the same data can be compared."
        )
    right_first = first.predicted[rows] == labels
    right_second = second.predicted[others] == labels
    sampling = {"resamples": resamples, "seed": seed}
    difference = compare_predictions(right_first, right_second, images, **sampling)
    return LanguageComparison(
        lang=first.lang,
        num_examples=len(rows),
        num_images=len(np.unique(images)),
        only_in_first=len(first) - len(rows),
        only_in_second=len(second) - len(rows),
        accuracy_first=float(right_first.mean()),
        accuracy_second=float(right_second.mean()),
        agreement=float(np.mean(first.predicted[rows] == second.predicted[others])),
        difference=difference,
        verdict="tie" if difference.is_tie else "first" if difference.value > 0 else "second",
    )
