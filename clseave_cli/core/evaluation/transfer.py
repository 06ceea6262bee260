"""How close a student's embeddings come to its teacher's, and whether distant languages lose more.

The distances of the thesis's languages are in the package; those of others are lang2vec's. One
analysis never mixes the two: the table may be of another version of URIEL.

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

from clseave_cli.core.models.ranking import rank
from clseave_cli.errors import ExtraMissing

_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """Distances between student and teacher embeddings of the same sentences."""

    num_sentences: int  # N
    mse: float  # mean squared error per sentence and dimension
    mae: float  # mean absolute error per sentence and dimension
    # Squared error summed over dimensions, per sentence: `mse` · D. The thesis's validation
    # metric (its Table A.2: 7.62 to 8.33 at D = 512, so 0.0149 to 0.0163).
    mse_sum: float
    mae_sum: float  # absolute error summed over dimensions, per sentence (the thesis: 46 to 48)
    cosine: float  # mean cosine of the two embeddings of a sentence
    # Share of student embeddings whose nearest teacher embedding (by cosine) is of the same
    # sentence.
    retrieval_to_teacher: float
    retrieval_to_student: float  # the same from the teacher's side
    variance_student: float  # variance over sentences, mean over dimensions; near 0: collapsed
    variance_teacher: float  # the same for the teacher, for comparison
    # The highest mean cosine that one answer to all sentences can have; None: an older document.
    cosine_constant: float | None = None


def measure_transfer(
    student: npt.ArrayLike, teacher: npt.ArrayLike, sentences: npt.ArrayLike
) -> Transfer:
    """Compares (N, D) embeddings of translations and, in the same order, of the originals.

    `sentences` are the (N,) identities of the sentences, e.g. the English texts: rows that share
    one are the same sentence, and retrieving any of them is a hit.

    Raises:
        ValueError: no rows, or shapes that do not match.
    """
    predicted = np.asarray(student, dtype=np.float32)
    wanted = np.asarray(teacher, dtype=np.float32)
    if predicted.ndim != 2 or predicted.shape != wanted.shape or not predicted.size:
        raise ValueError(f"need equal (N, D) embeddings, not {predicted.shape} and {wanted.shape}")
    _, groups = np.unique(np.asarray(sentences), return_inverse=True)
    if groups.shape != predicted.shape[:1]:
        raise ValueError(f"{len(predicted)} embeddings need as many sentences, not {groups.shape}")
    error = predicted - wanted
    mse = float(np.mean(np.square(error), dtype=np.float64))
    mae = float(np.mean(np.abs(error), dtype=np.float64))
    to_teacher, to_student = (
        rank(*sides, lambda rows: groups[rows, None] == groups).within(1).mean()
        for sides in ((predicted, wanted), (wanted, predicted))
    )
    # A zero row stays zero, with cosine 0 to everything.
    student_unit, teacher_unit = normalize(predicted), normalize(wanted)
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
        variance_teacher=float(np.var(wanted, axis=0, dtype=np.float64).mean()),
        cosine_constant=float(np.linalg.norm(teacher_unit.mean(axis=0, dtype=np.float64))),
    )


# --- linguistic distance ---

#: Distance to English by kind and language, 0 near to 1 far; None: the cell is lost in the source.
#: Source: the thesis's section 1.2, Table 1.1, taken there from URIEL (Littell et al., "URIEL and
#: lang2vec: Representing languages as typological, geographical, and phylogenetic vectors", 2017).
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
#: Installs a lang2vec that has distances.
LANG2VEC_COMMAND = 'pip install "setuptools<81" git+https://github.com/antonisa/lang2vec'

# All orders of up to eight points are tried (40,320); beyond, scipy's approximation is good.
_MOST_EXACT_POINTS = 8


@dataclass(frozen=True)
class Correlation:
    """One kind of distance against the loss in transfer, over languages."""

    # Distance to the source language by language; None where there is none.
    distances: dict[str, float | None]
    num_languages: int  # n, languages with both numbers
    pearson: float | None  # linear correlation; None where undefined (n < 3, or one side constant)
    pearson_p: float | None  # two-sided p, over all orders of the points where n ≤ 8
    spearman: float | None  # rank correlation; None where undefined
    spearman_p: float | None  # as `pearson_p`
    # What `spearman_p` would be if the languages lost in the order of this distance: equal
    # distances (or losses) let more orders be as good. None where n > 8, too.
    smallest_p: float | None = None


@dataclass(frozen=True)
class DistanceAnalysis:
    """Transfer loss against every kind of distance."""

    source: str  # where the distances come from
    losses: dict[str, float]  # accuracy lost to the source language, a fraction, by language
    correlations: dict[str, Correlation]  # by kind of distance
    note: str  # what so few points can and cannot show, in a sentence or two


def analyse_distances(
    accuracies: Mapping[str, float], source_lang: str = "en"
) -> DistanceAnalysis | None:
    """Correlates what each language loses against the source with each kind of distance.

    The thesis's table, of distances to English, is used where it has every language; otherwise
    lang2vec, where it is installed; otherwise the table, with gaps.

    None without the source language or without another; also where that is not English and
    lang2vec is not installed. `accuracies` are fractions by language.
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
    asked = {kind: {lang: of.get(lang) for lang in losses} for kind, of in distances.items()}
    correlations = {kind: _correlate(of, losses) for kind, of in asked.items()}
    note = describe_power(len(losses), {k: c.smallest_p for k, c in correlations.items()})
    return DistanceAnalysis(source, losses, correlations, note + gaps)


def _correlate(distances: dict[str, float | None], losses: Mapping[str, float]) -> Correlation:
    pairs = [(value, losses[lang]) for lang, value in distances.items() if value is not None]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(distances, len(x), None, None, None, None)
    linear, ranks = _with_p(x, y), _with_p(stats.rankdata(x), stats.rankdata(y))
    return Correlation(distances, len(x), *linear[:2], *ranks)


def _with_p(x: _Vector, y: _Vector) -> tuple[float, float, float | None]:
    """Pearson's r, how often a random order of `y` gives one as far from zero, and the same p of
    the best order of `y`."""
    if len(x) > _MOST_EXACT_POINTS:
        result = stats.pearsonr(x, y)
        return float(result.statistic), float(result.pvalue), None
    x_centred, y_centred = x - x.mean(), y - y.mean()
    scale = np.sqrt((x_centred @ x_centred) * (y_centred @ y_centred))
    orders = np.array(list(permutations(range(len(y)))))
    r = float(x_centred @ y_centred / scale)
    by_chance = np.abs(y_centred[orders] @ x_centred / scale)
    # A hair's width of slack: equal values of r may differ by rounding.
    p, smallest = (float(np.mean(by_chance >= at - 1e-12)) for at in (abs(r), by_chance.max()))
    return r, p, smallest


def describe_power(num_languages: int, smallest: Mapping[str, float | None]) -> str:
    """What a correlation over so few languages can and cannot show.

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
        ": a perfect ranking by a distance has its smallest p, larger where distances are equal "
        f"and below 0.05 for {able}"
    )
    return (
        f"Only {num_languages} languages{limit if measured else ''}. Several kinds of distance are "
        "tried, so one high correlation is to be expected by chance, and related languages are "
        "not independent points. This can suggest an order; it cannot show a cause, nor tell the "
        "distances apart."
    )


def lang2vec_distances(
    languages: Sequence[str], source_lang: str = "en"
) -> dict[str, dict[str, float | None]]:
    """All of URIEL's distances to a language, as lang2vec itself gives them.

    By kind and language; None where URIEL lacks one of the two. Codes are ISO 639-1 or 639-3, a
    script or region after them or not.

    Raises:
        ExtraMissing: lang2vec is not installed, or its version has no distances.
    """
    try:
        # It needs pkg_resources, which newer versions of setuptools lack and older ones warn of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lang2vec: Any = import_module("lang2vec.lang2vec")
            listed = set(lang2vec.DISTANCE_LANGUAGES)
    except (ImportError, AttributeError):
        raise ExtraMissing(
            "lang2vec with its distances is not installed, and PyPI's version has none; run: "
            f"{LANG2VEC_COMMAND}."
        ) from None

    def code(lang: str) -> str:
        # Script and region do not make another language of it: zh-Hant, pt-BR.
        bare = lang.partition("-")[0]
        return str(lang2vec.LETTER_CODES.get(bare, bare))

    kinds = list(THESIS_DISTANCES)
    result: dict[str, dict[str, float | None]] = {kind: dict.fromkeys(languages) for kind in kinds}
    for lang in languages:
        pair = code(source_lang), code(lang)
        if listed.issuperset(pair):
            for kind, distance in zip(kinds, lang2vec.distance(kinds, *pair), strict=True):
                result[kind][lang] = float(distance)
    return result
