"""Scores of one set of predictions, paired differences between two, and how sure both are.

About 18 hypotheses of SNLI-VE share a photo, so rows are not independent; photos are. Intervals and
tests therefore resample photos: a resample draws G photos with replacement and takes all rows of
each. Every statistic here is a function of sums over rows, so a resample is a vector of G counts,
and all resamples are one matrix product.

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

#: Share of the resamples that an interval leaves out, both ends together.
ALPHA = 0.05

#: Bins of equal width in which calibration is measured.
NUM_BINS = 15

# Quotients that are equal but for their last bits.
_ROUNDING = 1e-12

# Weights held at once: 4 million counts are 32 MB, whatever the number of photos.
_WEIGHTS_AT_ONCE = 4_000_000


# --- resampling photos ---


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % interval; None: too few photos or resamples for one."""

    value: float
    low: float | None
    high: float | None

    def ends(self) -> dict[str, float | None]:
        """The three by what a key of the results has after its name."""
        return {"": self.value, "_low": self.low, "_high": self.high}


def cluster_sums(quantities: npt.ArrayLike, images: npt.ArrayLike) -> Floats:
    """(G, S) sums of (N, S) quantities over the rows of each photo.

    Photos are in sorted order, so that the same photos in two languages get the same resamples from
    the same seed.
    """
    values = np.asarray(quantities, dtype=np.float64)
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    num_clusters = int(cluster.max()) + 1 if len(cluster) else 0
    columns = [np.bincount(cluster, column, num_clusters) for column in values.T]
    return np.stack(columns, axis=1)


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
    the plain 2.5 % becomes Φ(√(G/(G−1)) · t₀.₀₂₅,G₋₁), which is 2.5 % again for many photos.

    `statistic` maps (…, S) totals of the (G, S) sums to (…) values. There is no interval where
    there is a single photo, where the resamples do not reach the tail, or where they all agree: the
    bootstrap would claim certainty.
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
    # Which resample, counted from either end, ends the interval; 0: there are too few.
    rank = int((len(resampled) + 1) * stats.norm.cdf(widened))
    if not rank:
        return None, None
    # Resamples themselves, nothing between them: zero is then outside exactly where p is small.
    ordered = np.sort(resampled)
    return float(ordered[rank - 1]), float(ordered[-rank])


def _smallest_share(num_clusters: int) -> float:
    """The share of all photos that is at least of a kind, where all G seen are: the exact bound."""
    return float((ALPHA / 2) ** (1 / num_clusters))


def _two_sided_p(resampled: Floats, num_clusters: int) -> float:
    """The largest level at which the interval of `_percentiles` still holds zero."""
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
    """(G, 2) sum of the values of each photo's rows, and how many they are."""
    column = np.asarray(values, dtype=np.float64)
    return cluster_sums(np.stack([column, np.ones_like(column)], axis=1), images)


def _mean(sums: Floats) -> Floats:
    """(…, 2) sums and counts to (…) means."""
    mean: Floats = sums[..., 0] / sums[..., 1]
    return mean


def accuracy_interval(
    correct: npt.ArrayLike, images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """Accuracy with its 95 % interval, from (N,) bool or the share of trainings that are right.

    Where the photos are all alike (every row right, say), all resamples agree and the bootstrap
    would claim certainty. The interval there is the exact binomial one (Clopper and Pearson, 1934)
    with photos for trials: how many photos could be of another kind, at worst all wrong or right.
    """
    sums = _counted(correct, images)
    if len(sums) < 2 or np.ptp(_mean(sums)) > _ROUNDING:
        return interval(sums, _mean, resamples=resamples, seed=seed)
    value, alike = float(_mean(sums.sum(axis=0))), _smallest_share(len(sums))
    return Interval(value, alike * value, 1 - alike * (1 - value))


# --- two models on the same rows ---


@dataclass(frozen=True)
class Difference(Interval):
    """How two sets of predictions for the same rows differ in accuracy (first minus second).

    The interval is paired and clustered by photo.
    """

    p: float | None  # two-sided p of the same test: below 0.05 where the interval leaves out zero
    # Exact McNemar p, which takes rows for independent: too small where they are not.
    mcnemar_p: float
    only_first: int  # rows that only the first predictions get right
    only_second: int  # rows that only the second predictions get right
    num_examples: int  # rows compared

    @property
    def is_tie(self) -> bool:
        """Whether the rows cannot tell the two apart: the interval holds zero, or there is none."""
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

    Both `correct` are (N,) bool; of several trainings each, the share of them that is right.

    Both are scored on the same resamples of photos, so what a hard photo takes from both cancels
    out. If one model gets every row right and the other none, interval and p are those of the sign
    test over photos, which is exact. If the resamples are too few for the interval's tail (very few
    photos need one far out), there is no interval.
    """
    first = np.asarray(correct_first, dtype=np.float64)
    second = np.asarray(correct_second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"need two equal, non-empty rows, not {first.shape} and {second.shape}")
    gain = first - second
    sums = _counted(gain, images)
    ends: tuple[float | None, float | None] = (None, None)
    p: float | None = None
    if len(sums) > 1 and abs(gain.sum()) == len(gain):
        # A photo that was not seen could at worst be the other model's alone.
        worst = 2 * _smallest_share(len(sums)) - 1
        ends = (worst, 1.0) if gain[0] > 0 else (-1.0, -worst)
        p = mcnemar(len(sums), 0)
    elif len(sums) > 1:
        resampled = _mean(resampled_sums(sums, resamples, seed))
        ends, p = _percentiles(resampled, len(sums)), _two_sided_p(resampled, len(sums))
    only_first, only_second = int(np.sum(gain > 0)), int(np.sum(gain < 0))
    tests = p, mcnemar(only_first, only_second)
    return Difference(
        float(gain.mean()), *ends, *tests, only_first, only_second, num_examples=len(gain)
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test, exact at every size: two-sided binomial p of an even split of the rows that
    only one of the two models gets right."""
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def agreement(logits_first: npt.ArrayLike, logits_second: npt.ArrayLike) -> tuple[float, float]:
    """Share of rows that two models give the same label, right or wrong; and Cohen's κ.

    κ is the share beyond what two models with these label frequencies would share by chance; 1
    where both always give the same one label. Both logits are (N, C), of the same rows.
    """
    first, second = np.asarray(logits_first), np.asarray(logits_second)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"need equal, non-empty logits, not {first.shape} and {second.shape}")
    labels = first.argmax(axis=1), second.argmax(axis=1)
    share = float(np.mean(labels[0] == labels[1]))
    # Where everything agrees, chance may too: scikit-learn would divide by zero.
    kappa = 1.0 if share == 1 else float(cohen_kappa_score(*labels))
    return share, kappa


# --- one model ---


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one label, 0 where undefined; and its number of gold rows."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityPoint:
    """One bin of the reliability curve: how sure the model was there, and how often right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one set of predictions; accuracies are fractions."""

    num_examples: int  # N
    num_images: int  # G, photos that the rows share
    # Share of rows whose largest logit is the gold label's, with the ends of its 95 %
    # interval (None: too few photos or resamples).
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    loss: float  # mean cross-entropy in nats, with its 95 % interval
    loss_low: float | None = None
    loss_high: float | None = None
    macro_f1: float  # unweighted mean of the labels' F1, with its 95 % interval
    macro_f1_low: float | None
    macro_f1_high: float | None
    per_class: dict[str, ClassScores]  # by label name
    # Share of rows that get the label predicted most often; None: an older document.
    most_frequent: float | None = None
    confusion: tuple[tuple[int, ...], ...]  # (C, C) counts; row: gold label, column: predicted
    ece: float  # expected calibration error, a fraction
    # The non-empty bins behind `ece`, from unsure to sure.
    reliability: tuple[ReliabilityPoint, ...]
    aurc: float | None = None  # area under the risk-coverage curve; None: an older document
    # Its points: of the `count` surest rows the least confidence, and the accuracy, 1 − risk.
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
    """Computes every score of (N, C) logits, or logarithms of probabilities, of (N,) label ids.

    Raises:
        ValueError: no rows, shapes that do not match, a row without label, logits not finite.
    """
    gold, log_p = _checked(labels, logits, images)
    predicted = log_p.argmax(axis=1)
    ids = range(len(LABELS))
    cells = np.zeros((len(gold), len(LABELS) ** 2))
    cells[np.arange(len(gold)), gold * len(LABELS) + predicted] = 1.0
    sums = cluster_sums(cells, images)
    sampling: dict[str, Any] = {"resamples": resamples, "seed": seed}
    surprise = -log_p[np.arange(len(gold)), gold]
    intervals = {
        "accuracy": accuracy_interval(gold == predicted, images, **sampling),
        "loss": mean_interval(surprise, images, **sampling),
        "macro_f1": interval(sums, macro_f1, **sampling),
    }
    ends: dict[str, Any] = {
        name + end: v for name, i in intervals.items() for end, v in i.ends().items()
    }
    confusion = confusion_matrix(gold, predicted, labels=ids)
    columns = precision_recall_fscore_support(gold, predicted, labels=ids, zero_division=0.0)
    ece, reliability = calibration(gold, np.exp(log_p))
    aurc, curve = risk_coverage(gold == predicted, np.exp(log_p.max(axis=1)))
    return Scores(
        num_examples=len(gold),
        num_images=len(sums),
        **ends,
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


def _checked(
    labels: npt.ArrayLike, logits: npt.ArrayLike, images: npt.ArrayLike
) -> tuple[Ints, Floats]:
    gold = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(logits, dtype=np.float64)
    if gold.ndim != 1 or not len(gold):
        raise ValueError(f"labels must be a non-empty vector, not of shape {gold.shape}")
    if scores.shape != (len(gold), len(LABELS)) or np.shape(images) != gold.shape:
        raise ValueError(
            f"{len(gold)} labels need logits of shape {(len(gold), len(LABELS))} and as many "
            f"images, not {scores.shape} and {np.shape(images)}"
        )
    if gold.min() < 0 or gold.max() >= len(LABELS):
        raise ValueError("every row needs a label; leave unlabelled rows out")
    if not np.isfinite(scores).all():
        raise ValueError("logits are not finite")
    return gold, log_softmax(scores, axis=1)


def macro_f1(cells: Floats) -> Floats:
    """(…) macro-F1 of (…, C·C) flattened confusion matrices, gold label first.

    Mean over the labels of 2·tp / (gold + predicted), 0 for a label that has neither.
    """
    matrix = cells.reshape(*cells.shape[:-1], len(LABELS), len(LABELS))
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    totals = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    f1 = np.divide(2 * hits, totals, out=np.zeros_like(hits), where=totals > 0)
    result: Floats = f1.mean(axis=-1)
    return result


def calibration(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_bins: int = NUM_BINS
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
    Classifiers", 2019). Each of equally sure answers counts as their mean, in whatever order.
    """
    levels, group = np.unique(-np.asarray(confidence, dtype=np.float64), return_inverse=True)
    sizes = np.bincount(group)
    right = np.bincount(group, np.asarray(correct, dtype=np.float64)) / sizes
    count, least = np.arange(1, len(group) + 1), -np.repeat(levels, sizes)
    accuracy = np.cumsum(np.repeat(right, sizes)) / count
    shown = np.unique(np.linspace(0, len(group) - 1, 50, dtype=np.int64)).tolist()
    points = (ReliabilityPoint(float(least[k]), float(accuracy[k]), k + 1) for k in shown)
    return float(1 - accuracy.mean()), tuple(points)
