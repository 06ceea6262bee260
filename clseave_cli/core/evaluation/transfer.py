"""How close a student's embeddings come to its teacher's, and whether distant languages lose more.

Distances come from the thesis's table or from lang2vec, never from both, because the table may be
of another version of URIEL.

N sentences · D embedding width
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.preprocessing import normalize

from clseave_cli.core.evaluation.metrics import Floats, require_equal_shapes
from clseave_cli.core.models.ranking import rank
from clseave_cli.errors import ExtraMissing


@dataclass(frozen=True)
class Transfer:
    """Distances between student and teacher embeddings of the same sentences."""

    num_sentences: int  # N
    mse: float  # squared and absolute error, means over sentences and dimensions
    mae: float
    # The same summed over dimensions, as in the thesis's Tables A.2 and A.3: at D = 512, it has an
    # MSE of 7.62 to 8.33 (0.0149 to 0.0163 per dimension) and an MAE of 46 to 48.
    mse_sum: float
    mae_sum: float
    cosine: float  # mean cosine of the two embeddings of a sentence
    # Share of student embeddings whose nearest teacher embedding (by cosine) is of the same
    # sentence, and the reverse.
    retrieval_to_teacher: float
    retrieval_to_student: float
    variance_student: float  # over sentences, mean over dimensions; near 0: collapsed
    variance_teacher: float
    # The highest mean cosine of a constant answer; None: an older document.
    cosine_constant: float | None = None


def measure_transfer(
    student: npt.ArrayLike, teacher: npt.ArrayLike, sentences: npt.ArrayLike
) -> Transfer:
    """Compares (N, D) embeddings of translations with those of the originals, in the same order.

    `sentences` are the (N,) identities of the sentences, such as the English texts: retrieving any
    row of the same sentence is a hit.

    Raises:
        ValueError: no rows, or shapes that do not match.
    """
    predicted, target = np.asarray(student, np.float32), np.asarray(teacher, np.float32)
    require_equal_shapes(predicted, target)
    require_equal_shapes(predicted[..., 0], sentences)
    _, groups = np.unique(np.asarray(sentences), return_inverse=True)
    error = predicted - target
    mse = float(np.mean(np.square(error), dtype=np.float64))
    mae = float(np.mean(np.abs(error), dtype=np.float64))
    to_teacher, to_student = (
        rank(*sides, lambda rows: groups[rows, None] == groups).within(1).mean()
        for sides in ((predicted, target), (target, predicted))
    )
    # A zero row stays zero, with cosine 0 to everything.
    student_unit, teacher_unit = normalize(predicted), normalize(target)
    return Transfer(
        num_sentences=len(predicted),
        mse=mse,
        mae=mae,
        mse_sum=mse * predicted.shape[1],
        mae_sum=mae * predicted.shape[1],
        cosine=float(np.mean(np.sum(student_unit * teacher_unit, axis=1), dtype=np.float64)),
        retrieval_to_teacher=float(to_teacher),
        retrieval_to_student=float(to_student),
        variance_student=float(np.var(predicted, axis=0, dtype=np.float64).mean()),
        variance_teacher=float(np.var(target, axis=0, dtype=np.float64).mean()),
        cosine_constant=float(np.linalg.norm(teacher_unit.mean(axis=0, dtype=np.float64))),
    )


#: Distance to English by kind and language, from 0 to 1; None: illegible in the source. Source:
#: Table 1.1 of the thesis, from URIEL (Littell et al., "URIEL and lang2vec: Representing languages
#: as typological, geographical, and phylogenetic vectors", 2017).
THESIS_DISTANCES: dict[str, dict[str, float | None]] = {
    "featural": {"de": 0.4, "nl": 0.5, "ja": 0.6, "zh": 0.6, "ko": 0.5},
    "syntactic": {"de": 0.42, "nl": 0.49, "ja": 0.57, "zh": 0.57, "ko": 0.62},
    "genetic": {"de": 0.4286, "nl": 0.6, "ja": None, "zh": None, "ko": None},
    "geographic": {"de": 0.1, "nl": None, "ja": None, "zh": None, "ko": 0.4},
    "phonological": {"de": 0.3277, "nl": 0.5687, "ja": 0.5687, "zh": 0.5687, "ko": 0.4638},
    "inventory": {"de": 0.4364, "nl": 0.4861, "ja": 0.5983, "zh": 0.5983, "ko": 0.4866},
}

THESIS_SOURCE = "thesis Table 1.1 (URIEL)"
LANG2VEC_SOURCE = "lang2vec (URIEL)"

# Up to eight points, all orders are tried (40,320); beyond, SciPy's approximation is good.
_MOST_EXACT_POINTS = 8


@dataclass(frozen=True)
class Correlation:
    """One kind of distance against the loss in transfer, over languages."""

    distances: dict[str, float | None]  # to the source language, by language
    num_languages: int  # n, languages with both numbers
    # Linear and rank correlation with two-sided p, over all orders of the points if n ≤ 8. None:
    # undefined (n < 3, or one side constant).
    pearson: float | None
    pearson_p: float | None
    spearman: float | None
    spearman_p: float | None
    # `spearman_p` if the languages lost exactly in the order of this distance; larger with equal
    # distances or losses. None, too, if n > 8.
    smallest_p: float | None = None


@dataclass(frozen=True)
class DistanceAnalysis:
    """Transfer loss against every kind of distance."""

    source: str  # where the distances come from
    losses: dict[str, float]  # accuracy lost to the source language, a fraction, by language
    correlations: dict[str, Correlation]  # by kind of distance
    note: str  # what so few points can show, in a sentence or two


def analyse_distances(
    accuracies: Mapping[str, float], source_lang: str = "en"
) -> DistanceAnalysis | None:
    """Correlates the accuracy lost to the source language with each kind of distance.

    Uses the thesis's table, of distances to English, if it has every language; otherwise lang2vec,
    if installed; otherwise the table, with gaps. `accuracies` are fractions by language.

    Returns:
        None without the source language or without another, or if the source is not English and
        lang2vec is not installed.
    """
    if source_lang not in accuracies or len(accuracies) == 1:
        return None
    best = accuracies[source_lang]
    losses = {lang: best - value for lang, value in accuracies.items() if lang != source_lang}
    missing = sorted(set(losses) - set(THESIS_DISTANCES["featural"]))
    distances: Mapping[str, Mapping[str, float | None]] = THESIS_DISTANCES
    source, gaps = THESIS_SOURCE, ""
    if missing or source_lang != "en":
        try:
            distances, source = lang2vec_distances(list(losses), source_lang), LANG2VEC_SOURCE
        except ExtraMissing as error:
            if source_lang != "en":
                return None
            gaps = f" No distances of {', '.join(missing)}: {error}"
        else:
            unknown = [lang for lang in losses if all(d[lang] is None for d in distances.values())]
            if unknown:
                gaps = f" lang2vec does not know {', '.join(unknown)}."
    correlations = {
        kind: _correlate({lang: by_lang.get(lang) for lang in losses}, losses)
        for kind, by_lang in distances.items()
    }
    note = describe_power(len(losses), {k: c.smallest_p for k, c in correlations.items()})
    return DistanceAnalysis(source, losses, correlations, note + gaps)


def _correlate(distances: dict[str, float | None], losses: Mapping[str, float]) -> Correlation:
    pairs = [(value, losses[lang]) for lang, value in distances.items() if value is not None]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(distances, len(x), None, None, None, None)
    linear, ranks = _with_p(x, y), _with_p(stats.rankdata(x), stats.rankdata(y))
    return Correlation(distances, len(x), *linear[:2], *ranks)


def _with_p(x: Floats, y: Floats) -> tuple[float, float, float | None]:
    """Pearson's r, its two-sided permutation p, and the p of the best order of `y`."""
    if len(x) > _MOST_EXACT_POINTS:
        result = stats.pearsonr(x, y)
        return float(result.statistic), float(result.pvalue), None
    x_centred, y_centred = x - x.mean(), y - y.mean()
    scale = np.sqrt((x_centred @ x_centred) * (y_centred @ y_centred))
    orders = np.array(list(permutations(range(len(y)))))
    r = float(x_centred @ y_centred / scale)
    by_chance = np.abs(y_centred[orders] @ x_centred / scale)
    # Equal values of r may differ by rounding.
    p, smallest = (float(np.mean(by_chance >= at - 1e-12)) for at in (abs(r), by_chance.max()))
    return r, p, smallest


def describe_power(num_languages: int, smallest: Mapping[str, float | None]) -> str:
    """What a correlation over so few languages can show.

    `num_languages` is without the source, `smallest` is `Correlation.smallest_p` by kind.
    """
    if num_languages < 3:
        return f"{num_languages} languages besides the source: too few for any correlation."
    if num_languages > _MOST_EXACT_POINTS:
        return (
            f"{num_languages} languages, some of them related to one another: read the "
            "correlations as description, not as proof of a cause."
        )
    measured = {kind: p for kind, p in smallest.items() if p is not None}
    able = ", ".join(kind for kind, p in measured.items() if p < 0.05) or "none"
    limit = (
        ": the smallest possible p, that of a perfect ranking by a distance, is larger if "
        f"distances are equal, and below 0.05 for {able}"
    )
    return (
        f"Only {num_languages} languages{limit if measured else ''}. With several kinds of "
        "distance, expect one high correlation by chance; related languages are not independent "
        "points. This can suggest an order, but it cannot show a cause or tell the distances apart."
    )


def lang2vec_distances(
    languages: Sequence[str], source_lang: str = "en"
) -> dict[str, dict[str, float | None]]:
    """URIEL's distances to a language from lang2vec, by kind and language.

    None: URIEL lacks one of the two. Codes are ISO 639-1 or 639-3; script and region are ignored.

    Raises:
        ExtraMissing: lang2vec is not installed, or its version has no distances.
    """
    try:
        # It imports pkg_resources, which is deprecated or, in newer versions of setuptools, gone.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lang2vec: Any = import_module("lang2vec.lang2vec")
            listed = set(lang2vec.DISTANCE_LANGUAGES)
    except (ImportError, AttributeError):
        raise ExtraMissing(
            "lang2vec with its distances is not installed, and PyPI's version has none; run: "
            'pip install "setuptools<81" git+https://github.com/antonisa/lang2vec.'
        ) from None

    def code(lang: str) -> str:
        bare = lang.partition("-")[0]  # zh-Hant, pt-BR
        return str(lang2vec.LETTER_CODES.get(bare, bare))

    kinds = list(THESIS_DISTANCES)
    result: dict[str, dict[str, float | None]] = {kind: dict.fromkeys(languages) for kind in kinds}
    for lang in languages:
        pair = code(source_lang), code(lang)
        if listed.issuperset(pair):
            for kind, distance in zip(kinds, lang2vec.distance(kinds, *pair), strict=True):
                result[kind][lang] = float(distance)
    return result
