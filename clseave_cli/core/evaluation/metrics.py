"""Scores of one set of predictions, paired differences between two, and intervals of both.

About 18 hypotheses of SNLI-VE share a photo, so photos are independent and rows are not. Intervals
and tests therefore resample photos: G photos with replacement, with all their rows. Every statistic
is a function of sums over rows, so the resamples are one matrix product.

N rows · C = 3 labels, in the order of `labels.LABELS` · G photos (clusters) · R resamples ·
S summed quantities. Throughout, `images` are the (N,) photos of the rows, numbers or strings;
`resamples` is R; `seed` is that of the resampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import log_softmax
from sklearn.metrics import cohen_kappa_score, confusion_matrix, precision_recall_fscore_support

from clseave_cli.labels import LABELS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: One minus the confidence of every interval.
ALPHA = 0.05

# Numbers that differ by less are equal.
_ROUNDING = 1e-12

# 32 MB of weights, whatever the number of photos.
_WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % interval; None: too few photos or resamples for one."""

    value: float
    low: float | None
    high: float | None

    def keyed(self, name: str) -> dict[str, float | None]:
        """The three numbers by their keys in the results."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def require_equal_shapes(*columns: npt.ArrayLike) -> None:
    """Raises ValueError for columns that are empty, or that NumPy would broadcast."""
    shapes = {np.shape(column) for column in columns}
    if len(shapes) > 1 or 0 in min(shapes):
        raise ValueError(f"need equal, non-empty shapes, not {sorted(shapes)}")


def cluster_sums(quantities: npt.ArrayLike, images: npt.ArrayLike) -> Floats:
    """(G, S) sums of (N, S) quantities over the rows of each photo.

    Photos are sorted, so the same photos in two languages get the same resamples from a seed.
    """
    values = np.asarray(quantities, dtype=np.float64)
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    return np.stack([np.bincount(cluster, column) for column in values.T], axis=1)


def resampled_sums(sums: Floats, resamples: int, seed: int) -> Floats:
    """(R, S) totals of (G, S) sums in every resample of the photos.

    Row r is w_r @ sums with w_r ~ Multinomial(G; 1/G, …, 1/G).
    """
    generator, num_clusters = np.random.default_rng(seed), len(sums)
    chunk = max(1, _WEIGHTS_AT_ONCE // num_clusters)
    totals = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = generator.integers(num_clusters, size=(count, num_clusters))
        drawn += np.arange(count)[:, None] * num_clusters
        weights = np.bincount(drawn.ravel(), minlength=count * num_clusters)
        totals.append(weights.reshape(count, -1).astype(np.float64) @ sums)
    return np.concatenate(totals)


def interval(
    sums: Floats, statistic: Callable[[Floats], Floats], *, resamples: int, seed: int
) -> Interval:
    """A statistic with its 95 % bootstrap interval, clustered by photo.

    The ends are percentiles of the resampled statistic, widened for few photos as in Hesterberg,
    "What Teachers Should Know About the Bootstrap" (The American Statistician, 2015, section 5.2):
    the plain 2.5 % becomes Φ(√(G/(G−1)) · t₀.₀₂₅,G₋₁), which approaches 2.5 % with more photos.

    `statistic` maps (…, S) totals of the (G, S) sums to (…) values. There is no interval for a
    single photo, for too few resamples, or if all resamples agree: the bootstrap would claim
    certainty.
    """
    value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    if len(sums) < 2:
        return Interval(value, None, None)
    resampled = statistic(resampled_sums(sums, resamples, seed))
    if np.ptp(resampled) < _ROUNDING:
        return Interval(value, None, None)
    return Interval(value, *_percentiles(resampled, len(sums)))


def _percentiles(resampled: Floats, num_clusters: int) -> tuple[float, float] | tuple[None, None]:
    widened = np.sqrt(num_clusters / (num_clusters - 1)) * stats.t.ppf(ALPHA / 2, num_clusters - 1)
    rank = int((len(resampled) + 1) * stats.norm.cdf(widened))
    if not rank:  # too few resamples
        return None, None
    # No interpolation: the interval then excludes zero exactly when p is small.
    ordered = np.sort(resampled)
    return float(ordered[rank - 1]), float(ordered[-rank])


def _smallest_share(num_clusters: int) -> float:
    """The exact lower bound on the share of photos of a kind, if all G sampled ones are."""
    return float((ALPHA / 2) ** (1 / num_clusters))


def _two_sided_p(resampled: Floats, num_clusters: int) -> float:
    """The largest level at which the interval of `_percentiles` contains zero."""
    size = len(resampled) + 1
    tail = min((np.sum(resampled <= 0) + 1) / size, (np.sum(resampled >= 0) + 1) / size, 0.5)
    narrowed = stats.norm.ppf(tail) / np.sqrt(num_clusters / (num_clusters - 1))
    return float(2 * stats.t.cdf(narrowed, num_clusters - 1))


def mean_interval(
    values: npt.ArrayLike, images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """The mean of (N,) values over rows with its 95 % interval."""
    return interval(_counted(values, images), _mean, resamples=resamples, seed=seed)


def _counted(values: npt.ArrayLike, images: npt.ArrayLike) -> Floats:
    """(G, 2) sum of the values of each photo's rows, and their number."""
    column = np.asarray(values, dtype=np.float64)
    return cluster_sums(np.stack([column, np.ones_like(column)], axis=1), images)


def _mean(sums: Floats) -> Floats:
    mean: Floats = sums[..., 0] / sums[..., 1]
    return mean


def accuracy_interval(
    correct: npt.ArrayLike, images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """Accuracy with its 95 % interval, from (N,) bool or the share of trainings that are right.

    If all photos have the same accuracy (1, say), all resamples agree and the bootstrap would claim
    certainty. The interval is then the exact binomial one (Clopper and Pearson, 1934) with photos
    as trials: the share of photos that could differ, at worst all wrong or all right.
    """
    sums = _counted(correct, images)
    if len(sums) < 2 or np.ptp(_mean(sums)) > _ROUNDING:
        return interval(sums, _mean, resamples=resamples, seed=seed)
    value, alike = float(_mean(sums.sum(axis=0))), _smallest_share(len(sums))
    return Interval(value, alike * value, 1 - alike * (1 - value))


@dataclass(frozen=True)
class Difference(Interval):
    """The paired difference in accuracy on the same rows, first minus second, by photo."""

    p: float | None  # two-sided; below 0.05 exactly when the interval excludes zero
    mcnemar_p: float  # exact McNemar p, too small because it assumes that rows are independent
    only_first: int  # rows that only the first predictions get right
    only_second: int  # rows that only the second predictions get right
    num_examples: int  # rows compared

    @property
    def is_tie(self) -> bool:
        """Whether the interval contains zero, or there is none."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


def compare_predictions(
    correct_first: npt.ArrayLike,
    correct_second: npt.ArrayLike,
    images: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """The paired difference in accuracy of two models on the same rows.

    Both `correct` are (N,) bool, or the share of several trainings that are right.

    Both are scored on the same resamples of photos, so hard photos cancel out. If one model gets
    every row right and the other none, interval and p are those of the exact sign test over photos.
    There is no interval if the resamples are too few for its tail (few photos need a longer one).

    Raises:
        ValueError: no rows, or not equally many.
    """
    require_equal_shapes(correct_first, correct_second, images)
    gain = np.asarray(correct_first, dtype=np.float64) - np.asarray(correct_second, np.float64)
    sums = _counted(gain, images)
    ends: tuple[float | None, float | None] = (None, None)
    p: float | None = None
    if len(sums) > 1 and abs(gain.sum()) == len(gain):
        # At worst, the other model alone is right on every photo outside the sample.
        worst = 2 * _smallest_share(len(sums)) - 1
        ends = (worst, 1.0) if gain[0] > 0 else (-1.0, -worst)
        p = mcnemar(len(sums), 0)
    elif len(sums) > 1:
        resampled = _mean(resampled_sums(sums, resamples, seed))
        ends, p = _percentiles(resampled, len(sums)), _two_sided_p(resampled, len(sums))
    discordant = int(np.sum(gain > 0)), int(np.sum(gain < 0))
    return Difference(float(gain.mean()), *ends, p, mcnemar(*discordant), *discordant, len(gain))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact p of McNemar's test on the rows that only one of two models gets right."""
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def agreement(logits_first: npt.ArrayLike, logits_second: npt.ArrayLike) -> tuple[float, float]:
    """Share of rows that two models give the same label, right or wrong; and Cohen's κ.

    Both logits are (N, C), of the same rows. κ is 1 if all labels agree.

    Raises:
        ValueError: no rows, or not equally many.
    """
    require_equal_shapes(logits_first, logits_second)
    first, second = (np.argmax(logits, axis=1) for logits in (logits_first, logits_second))
    share = float(np.mean(first == second))
    # scikit-learn would divide by zero if both always give the same one label.
    return share, 1.0 if share == 1 else float(cohen_kappa_score(first, second))


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one label, 0 if undefined; and its number of gold rows."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityPoint:
    """A point of the reliability or the risk-coverage curve."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one set of predictions; accuracies are fractions."""

    num_examples: int  # N
    num_images: int  # G, photos that the rows share
    # Each with the ends of its 95 % interval (None: too few photos or resamples).
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    loss: float  # mean cross-entropy in nats
    loss_low: float | None = None
    loss_high: float | None = None
    macro_f1: float  # unweighted mean of the labels' F1
    macro_f1_low: float | None
    macro_f1_high: float | None
    per_class: dict[str, ClassScores]  # by label name
    # Share of rows with the label predicted most often; None: an older document.
    most_frequent: float | None = None
    confusion: tuple[tuple[int, ...], ...]  # (C, C) counts; row: gold label, column: predicted
    ece: float  # expected calibration error, a fraction
    reliability: tuple[ReliabilityPoint, ...]  # non-empty bins of `ece`, by rising confidence
    aurc: float | None = None  # area under the risk-coverage curve; None: an older document
    # Its points: lowest confidence and accuracy (1 − risk) of the `count` most confident rows.
    risk_coverage: tuple[ReliabilityPoint, ...] = ()


def probabilities(logits: npt.ArrayLike) -> Floats:
    """Softmax over the labels of (N, C) logits, in double precision."""
    result: Floats = np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=1))
    return result


def score(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    images: npt.ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Scores:
    """Computes every score of (N, C) logits, or logarithms of probabilities, for (N,) label ids.

    Raises:
        ValueError: no rows, shapes that do not match, a row without label, or logits not finite.
    """
    gold = np.asarray(labels, dtype=np.int64)
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    if not gold.size or log_p.shape != (*gold.shape, len(LABELS)):
        raise ValueError(f"need (N,) labels and (N, 3) logits, not {gold.shape}, {log_p.shape}")
    if not (np.isin(gold, range(len(LABELS))).all() and np.isfinite(log_p).all()):
        raise ValueError("every row needs a label and finite logits")
    predicted = log_p.argmax(axis=1)
    cells = np.zeros((len(gold), len(LABELS) ** 2))
    cells[np.arange(len(gold)), gold * len(LABELS) + predicted] = 1.0
    sums = cluster_sums(cells, images)
    sampling: dict[str, Any] = {"resamples": resamples, "seed": seed}
    surprise = -log_p[np.arange(len(gold)), gold]
    intervals: dict[str, Any] = {
        **accuracy_interval(gold == predicted, images, **sampling).keyed("accuracy"),
        **mean_interval(surprise, images, **sampling).keyed("loss"),
        **interval(sums, macro_f1, **sampling).keyed("macro_f1"),
    }
    ids: dict[str, Any] = {"labels": range(len(LABELS))}
    confusion = confusion_matrix(gold, predicted, **ids)
    columns = precision_recall_fscore_support(gold, predicted, **ids, zero_division=0.0)
    ece, reliability = calibration(gold, np.exp(log_p))
    aurc, curve = risk_coverage(gold == predicted, np.exp(log_p.max(axis=1)))
    return Scores(
        num_examples=len(gold),
        num_images=len(sums),
        **intervals,
        per_class={
            name: ClassScores(*(column[label].item() for column in columns))
            for label, name in enumerate(LABELS)
        },
        confusion=tuple(map(tuple, confusion.tolist())),
        most_frequent=float(confusion.sum(axis=0).max() / len(gold)),
        ece=ece,
        reliability=reliability,
        aurc=aurc,
        risk_coverage=curve,
    )


def macro_f1(cells: Floats) -> Floats:
    """(…) macro-F1 of (…, C·C) flattened confusion matrices, gold label first, 0 if undefined."""
    matrix = cells.reshape(*cells.shape[:-1], len(LABELS), len(LABELS))
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    totals = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    f1 = np.divide(2 * hits, totals, out=np.zeros_like(hits), where=totals > 0)
    result: Floats = f1.mean(axis=-1)
    return result


def calibration(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_bins: int = 15
) -> tuple[float, tuple[ReliabilityPoint, ...]]:
    """Expected calibration error and the reliability curve of (N, C) probabilities.

    ECE = Σ_b (n_b / N) · |accuracy_b − confidence_b| over bins ((b−1)/B, b/B] of the largest
    probability (Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    confidence = p.max(axis=1)
    right = p.argmax(axis=1) == np.asarray(labels)
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    sizes, sure, correct = (
        np.bincount(bins, weights=values, minlength=num_bins)
        for values in (np.ones_like(confidence), confidence, right)
    )
    points = tuple(
        ReliabilityPoint(float(sure[b] / sizes[b]), float(correct[b] / sizes[b]), int(sizes[b]))
        for b in np.flatnonzero(sizes)
    )
    ece = sum(point.count * abs(point.accuracy - point.confidence) for point in points) / len(p)
    return ece, points


def risk_coverage(
    correct: npt.ArrayLike, confidence: npt.ArrayLike
) -> tuple[float, tuple[ReliabilityPoint, ...]]:
    """The area under the risk-coverage curve of (N,) answers, and points of the curve.

    The risk at coverage k / N is the share of wrong answers among the k surest; the area is its
    mean over k (Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", 2019). Equally sure answers all count as their mean.
    """
    levels, group = np.unique(-np.asarray(confidence, dtype=np.float64), return_inverse=True)
    sizes = np.bincount(group)
    right = np.bincount(group, np.asarray(correct, dtype=np.float64)) / sizes
    count, least = np.arange(1, len(group) + 1), -np.repeat(levels, sizes)
    accuracy = np.cumsum(np.repeat(right, sizes)) / count
    shown = np.unique(np.linspace(0, len(group) - 1, 50, dtype=np.int64)).tolist()
    points = (ReliabilityPoint(float(least[k]), float(accuracy[k]), k + 1) for k in shown)
    return float(1 - accuracy.mean()), tuple(points)
