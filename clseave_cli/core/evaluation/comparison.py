"""Compares two evaluations of the same rows, language by language: `clseave compare A B`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clseave_cli.core.evaluation.metrics.bootstrap import Difference, compare_predictions
from clseave_cli.core.evaluation.results import RESULTS_FILE, Results, Signature
from clseave_cli.core.evaluation.rows import PredictedRows, predicted_languages, read_predicted_rows
from clseave_cli.errors import DataError

Verdict = Literal["tie", "first", "second"]


@dataclass(frozen=True)
class LanguageComparison:
    """One language's two sets of predictions, on the rows that both have.

    Attributes:
        lang: language code.
        num_examples: rows compared.
        num_images: photos they share.
        only_in_first: rows that only the first evaluation has; they are left out.
        only_in_second: the same for the second.
        accuracy_first: accuracy on the rows compared, a fraction.
        accuracy_second: the same for the second.
        agreement: share of rows given the same label.
        difference: paired difference, first minus second.
        verdict: which is better, or `tie` where the difference's interval holds zero.
    """

    lang: str
    num_examples: int
    num_images: int
    only_in_first: int
    only_in_second: int
    accuracy_first: float
    accuracy_second: float
    agreement: float
    difference: Difference
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, compared.

    Attributes:
        first: name of the first folder.
        second: name of the second.
        languages: what both have, English first.
        missing_in_first: languages that only the second has.
        missing_in_second: languages that only the first has.
        resamples: bootstrap resamples.
        seed: their seed.
        signature_first: where the first evaluation's figures come from; None: its folder has
            predictions alone.
        signature_second: the same for the second.
    """

    first: str
    second: str
    languages: tuple[LanguageComparison, ...]
    missing_in_first: tuple[str, ...]
    missing_in_second: tuple[str, ...]
    resamples: int
    seed: int
    signature_first: Signature | None
    signature_second: Signature | None

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain dicts, lists, strings, numbers and None."""
        document = asdict(self)
        for name in ("languages", "missing_in_first", "missing_in_second"):
            document[name] = list(document[name])
        return document


def compare_reports(
    first: Path, second: Path, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compares two report folders (`evaluate --report`) by their rows.

    Rows meet by `pairID`. What the intervals say holds for one comparison; of many made at once,
    one in twenty ties will look like a difference.

    Args:
        first: report folder.
        second: report folder.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        DataError: a folder has no predictions, they have no language or no row in common, or they
            disagree about a row's label or photo; or a `results.json` is of another format.
    """
    ours, theirs = predicted_languages(first), predicted_languages(second)
    common = [lang for lang in ours if lang in theirs]
    if not common:
        raise DataError(
            f"{first} has {', '.join(ours)} and {second} has {', '.join(theirs)}: "
            "no language in common to compare."
        )
    return Comparison(
        first=str(first),
        second=str(second),
        languages=tuple(
            compare_rows(
                read_predicted_rows(first, lang),
                read_predicted_rows(second, lang),
                resamples=resamples,
                seed=seed,
            )
            for lang in common
        ),
        missing_in_first=tuple(lang for lang in theirs if lang not in ours),
        missing_in_second=tuple(lang for lang in ours if lang not in theirs),
        resamples=resamples,
        seed=seed,
        signature_first=_signature(first),
        signature_second=_signature(second),
    )


def _signature(folder: Path) -> Signature | None:
    return Results.read(folder).signature if (folder / RESULTS_FILE).is_file() else None


def compare_rows(
    first: PredictedRows, second: PredictedRows, *, resamples: int, seed: int
) -> LanguageComparison:
    """Compares two sets of predictions on the rows that both have.

    Raises:
        DataError: no row in common, or the two disagree about a row's label or photo.
    """
    place = {pair_id: row for row, pair_id in enumerate(second.pair_ids)}
    pairs = [
        (row, place[pair_id]) for row, pair_id in enumerate(first.pair_ids) if pair_id in place
    ]
    if not pairs:
        raise DataError(f"{first.lang}: no pairID in common; were they the same split?")
    for row, other in pairs:
        if first.labels[row] != second.labels[other] or first.images[row] != second.images[other]:
            raise DataError(
                f"{first.lang}: row {first.pair_ids[row]!r} has another label or image in the "
                "second evaluation; only evaluations of the same data can be compared."
            )
    rows, others = np.array(pairs).T
    right_first = first.predicted[rows] == first.labels[rows]
    right_second = second.predicted[others] == first.labels[rows]
    images = np.asarray(first.images)[rows]
    difference = compare_predictions(
        right_first, right_second, images, resamples=resamples, seed=seed
    )
    return LanguageComparison(
        lang=first.lang,
        num_examples=len(pairs),
        num_images=len(np.unique(images)),
        only_in_first=len(first) - len(pairs),
        only_in_second=len(second) - len(pairs),
        accuracy_first=float(right_first.mean()),
        accuracy_second=float(right_second.mean()),
        agreement=float(np.mean(first.predicted[rows] == second.predicted[others])),
        difference=difference,
        verdict="tie" if difference.is_tie else "first" if difference.value > 0 else "second",
    )
